"""Attention from the queries of packed documents to the keys of the same documents elsewhere, as in an encoder-decoder.

Legend: T queries, S keys, Hq/Hkv query and KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.model.attention.kernels.choice import Call, full_attention_kernel
from neomoba_dist.model.attention.kernels.layout import document_of
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES, varlen_attention


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, *, longest: int | None = None
) -> Tensor:
    """Softmax attention of every query to all keys of its document, scaled by 1 / sqrt(D), by the kernels that full
    attention of packed documents runs by (choice.FULL_ATTENTION).

    Args:
        q: [T, Hq, D]; k, v: [S, Hkv, D], Hkv divides Hq, any floating dtype.
        cu_queries, cu_keys: int32 [documents + 1], borders of the documents among queries and keys. Documents may be
            empty; one with queries must have keys.
        longest: no document has more tokens; None: T or S. A GPU starts work for this length for each document.

    Returns:
        [T, Hq, D] in the dtype of q.
    """
    kernel = full_attention_kernel(Call(q.device, q.dtype, q.shape[2], q.shape[0], True))
    most = [min(longest or len(x), len(x)) for x in (q, k)]
    return RUN[kernel](q, k, v, cu_queries, cu_keys, most)


def _documents(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, most: list[int]) -> Tensor:
    """SDPA, document by document."""
    borders = zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True)
    return torch.cat([_sdpa(q[a:b], k[c:d], v[c:d], None) for (a, b), (c, d) in borders if a < b])


def _masked(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, most: list[int]) -> Tensor:
    """SDPA with a [T, S] mask."""
    of_query, of_key = (
        document_of(torch.arange(len(x), device=x.device), borders) for x, borders in ((q, cu_queries), (k, cu_keys))
    )
    return _sdpa(q, k, v, of_query[:, None] == of_key)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] > k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, most: list[int], library: str
) -> Tensor:
    return varlen_attention(q, k, v, cu_queries, cu_keys, *most, False, q.shape[2] ** -0.5, library)[0]


RUN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]] = {
    "documents": _documents,
    **{name: partial(_varlen, library=name) for name in LIBRARIES},
    "sdpa": _masked,
}
