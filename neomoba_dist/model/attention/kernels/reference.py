"""MoBA attention as a dense mask: slow, readable, differentiated by autograd. The yardstick of the fast kernels.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout
from neomoba_dist.model.attention.kernels.select import score_dtype


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, layout: BlockLayout, *, causal: bool, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of the queries from number `first` over the keys of their chosen blocks; see moba.attend."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    mask = routed_keys(routes, layout, k.shape[0], causal, first)  # [T, R, S]
    mask = mask.repeat_interleave(num_heads // mask.shape[1], dim=1).unflatten(1, (num_kv_heads, -1))
    dtype = score_dtype(q.dtype)
    damaged = ~v.isfinite().all(-1, keepdim=True)  # 0 times not-a-number would reach queries that do not see the key
    k, v = k.masked_fill(damaged, torch.nan), v.masked_fill(damaged, 0)
    queries = q.to(dtype).unflatten(1, (num_kv_heads, -1))
    logits = torch.einsum("thgd,shd->thgs", queries, k.to(dtype)) * head_dim**-0.5
    has_key = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask & has_key, -torch.inf)  # a row without keys is computed over all, then zeroed
    lse = logits.logsumexp(-1)
    out = torch.einsum("thgs,shd->thgd", logits.softmax(-1), v.to(dtype)).masked_fill(~has_key, 0)
    lse = lse.masked_fill(~has_key[..., 0], -torch.inf)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def routed_keys(routes: Tensor, layout: BlockLayout, num_keys: int, causal: bool, first: int) -> Tensor:
    """bool [T, R, S]: the keys that each query sees; only its own block, column 0 of the routes, is causally masked."""
    if layout.spans is not None:
        index = torch.arange(num_keys, device=routes.device)
        seen = torch.zeros(*routes.shape[:2], num_keys, dtype=torch.bool, device=routes.device)
        for column in routes.unbind(2):
            start, length = layout.spans[column.clamp(min=0)].unsqueeze(-2).unbind(-1)
            seen |= (column >= 0)[..., None] & (index >= start) & (index < start + length)
        return seen
    key_block, key_position = layout.key_places(num_keys)
    own_mask = routes[:, :, :1] == key_block
    if causal:
        _, position = layout.query_places(first, first + routes.shape[0])
        own_mask = own_mask & (key_position <= position[:, None])[:, None]
    others = torch.zeros(*routes.shape[:2], layout.num_blocks + 1, dtype=torch.bool, device=routes.device)
    others.scatter_(-1, routes[:, :, 1:].long() + 1, True)  # column 0 takes the "no block" entries
    return own_mask | others[:, :, key_block + 1]
