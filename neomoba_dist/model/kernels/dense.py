"""Full attention over packed documents, without a [T, T] mask where a kernel allows it.

Legend: T queries, S keys, Hq/Hkv query and KV heads, D head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, cu_seqlens: Tensor | None = None) -> Tensor:
    """Softmax attention within each document, scaled by 1 / sqrt(D).

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], Hkv divides Hq, any floating dtype.
        causal: whether a query sees only the keys up to its own position.
        cu_seqlens: int32 [documents + 1] borders of the documents; None: one document.

    Returns:
        [T, Hq, D] in the dtype of q.
    """
    if cu_seqlens is None:
        return document_attention(q, k, v, causal)
    borders = cu_seqlens.tolist()
    parts = [
        document_attention(q[start:stop], k[start:stop], v[start:stop], causal)
        for start, stop in pairwise(borders)
        if stop > start
    ]
    return torch.cat(parts) if parts else torch.empty_like(q)


def document_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """SDPA over one document, tokens first."""
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
