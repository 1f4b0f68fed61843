"""Full attention over packed documents: the fastest kernel of the device, without a [T, T] mask where one allows it.

Legend: T tokens, Hq/Hkv query and KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.choice import Call, full_attention_kernel
from neomoba_dist.model.attention.kernels.cpu.flash import expand_keys, group_queries, ungroup_queries
from neomoba_dist.model.attention.kernels.layout import Geometry, PlacedBlocks, document_of, one_document
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES, varlen_attention


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    placed: PlacedBlocks | None = None,
) -> Tensor:
    """Softmax attention within each document, scaled by 1 / sqrt(D).

    choice.FULL_ATTENTION has the kernels and when each runs.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], Hkv divides Hq, any floating dtype.
        causal: whether a query sees only the keys up to its own position.
        cu_seqlens: int32 [documents + 1] borders of the documents; None: one document.
        longest: no document has more tokens; None: T. A GPU starts work for this length for each document.
        placed: what moba.place_blocks found for these borders, in blocks of any size; None: found here.

    Returns:
        [T, Hq, D] in the dtype of q.
    """
    packed = cu_seqlens is not None and cu_seqlens.shape[0] > 2
    kernel = full_attention_kernel(Call(q.device, q.dtype, q.shape[2], q.shape[0], packed))
    documents = Documents(cu_seqlens if packed else None, min(longest or q.shape[0], q.shape[0]), placed)
    return RUN[kernel](q, k, v, causal, documents)


class Documents(NamedTuple):
    """Where the documents lie. cu_seqlens: None for one document. longest, placed: as in `full_attention`."""

    cu_seqlens: Tensor | None
    longest: int
    placed: PlacedBlocks | None


def attend_documents(q: Tensor, k: Tensor, v: Tensor, ranges: Sequence[tuple[slice, slice]]) -> Tensor:
    """Causal attention of a few new queries to all keys of their document so far, by SDPA, document by document.

    For decoding: SDPA spreads one query's keys over a GPU, a kernel with tiles of queries does not. Where nothing is
    masked, the heads that share keys pass as several queries of one head, so that each key is read once.

    Args:
        q: [T, Hq, D] of all documents; k, v: [S, Hkv, D], Hkv divides Hq.
        ranges: rows of q and of k for each document, T in all; the last query stands at the last key.

    Returns:
        [T, Hq, D] in the dtype of q.
    """
    parts = []
    for queries, keys in ranges:
        part_q, part_k, part_v = (x[rows].transpose(0, 1)[None] for x, rows in ((q, queries), (k, keys), (v, keys)))
        new, known = part_q.shape[2], part_k.shape[2]
        if new == 1:
            grouped = part_q.view(1, k.shape[1], -1, q.shape[2])
            parts.append(F.scaled_dot_product_attention(grouped, part_k, part_v).reshape(1, *q.shape[1:]))
            continue
        mask = causal_lower_right(new, known)
        out = F.scaled_dot_product_attention(part_q, part_k, part_v, attn_mask=mask, enable_gqa=q.shape[1] > k.shape[1])
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _documents(q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents) -> Tensor:
    """The kernel of SDPA document by document."""
    geometry = Geometry.of(max(1, q.shape[0]), causal, documents.cu_seqlens, placed=documents.placed)
    return ops.attend(q, k, v, None, *geometry, "torch")[0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents, library: str) -> Tensor:
    """An upper bound of the lengths is all that the libraries need, and it asks nothing of the device."""
    cu_seqlens, longest, _ = documents
    borders = one_document(q.shape[0], q.device).int() if cu_seqlens is None else cu_seqlens
    return varlen_attention(q, k, v, borders, borders, longest, longest, causal, q.shape[2] ** -0.5, library)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents) -> Tensor:
    """SDPA by cuDNN, or by the next best where it refuses (its version, strides)."""
    assert documents.cu_seqlens is None
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(backends, set_priority=True):
        grouped = q.shape[1] > k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Documents) -> Tensor:
    """Torch's choice of kernel, with a [T, T] mask for packed documents.

    Keys are expanded as views, so that KV heads are not repeated in memory.
    """
    mask, cu_seqlens = None, documents.cu_seqlens
    if cu_seqlens is not None:
        index = torch.arange(q.shape[0], device=q.device)
        document = document_of(index, cu_seqlens)
        mask = document[:, None] == document
        if causal:
            mask &= index[:, None] >= index
    group = q.shape[1] // k.shape[1]
    if group == 1:  # heads as heads: 2 % faster at 256 tokens than heads as a batch
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        return out[0].transpose(0, 1)
    keys, values = expand_keys(k, group), expand_keys(v, group)
    out = F.scaled_dot_product_attention(
        group_queries(q, k.shape[1]), keys, values, attn_mask=mask, is_causal=causal and mask is None
    )
    return ungroup_queries(out)


RUN: dict[str, Callable[[Tensor, Tensor, Tensor, bool, Documents], Tensor]] = {
    "documents": _documents,
    "cudnn": _cudnn,
    **{name: partial(_varlen, library=name) for name in LIBRARIES},
    "sdpa": _sdpa,
}
