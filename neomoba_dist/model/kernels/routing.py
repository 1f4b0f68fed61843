"""Block representatives and the gate in plain torch: which blocks does each query attend to?

The gate (Lu et al., MoBA, arXiv 2502.13189, section 2.2) scores a block by the dot product of the query with a summary
of the block's keys and keeps the `top_k` best, the query's own block always among them. It has no gradient.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks, R rows of the routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neomoba_dist.model.kernels.layout import BlockLayout

POOLINGS = ("mean", "max", "minmax", "representative")
GATES = ("per_head", "kv_group")
TILE_ELEMENTS = 1 << 22  # scores held at a time; 16 MiB in float32


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and lse: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_keys(k: Tensor, pooling: str) -> Tensor:
    """Summarise keys [..., length, Hkv, D] of whole blocks over `length`: [..., Hkv, D], or 2 D for "minmax".

    Sums run in float32 (float64 for float64) and the mean is rounded to the key dtype, as the paper's code does;
    routing in bfloat16 flips for 0.2 % of the queries otherwise.
    """
    if pooling == "mean":
        return k.to(score_dtype(k.dtype)).mean(-3).to(k.dtype)
    if pooling == "max":
        return k.amax(-3)
    if pooling == "minmax":
        return torch.cat([k.amax(-3), k.amin(-3)], dim=-1)
    return k[..., -1, :, :].contiguous()


def block_means_torch(k: Tensor, layout: BlockLayout, pooling: str) -> Tensor:
    """Block summaries [N, Hkv, D or 2 D] in the key dtype; rows of blocks that do not exist are zero."""
    width = 2 * k.shape[-1] if pooling == "minmax" else k.shape[-1]
    means = k.new_zeros(layout.num_blocks, k.shape[1], width)
    block_size = layout.block_size
    borders, first_blocks = layout.cu_k.tolist(), layout.first_block.tolist()
    for start, stop, first in zip(borders, borders[1:], first_blocks):
        whole = (stop - start) // block_size
        if whole:
            blocks = k[start : start + whole * block_size].unflatten(0, (whole, block_size))
            means[first : first + whole] = pool_keys(blocks, pooling)
        if start + whole * block_size < stop:
            means[first + whole] = pool_keys(k[start + whole * block_size : stop], pooling)
    return means


def gate_queries(q: Tensor, num_kv_heads: int, gate: str, pooling: str) -> Tensor:
    """Queries as the gate sees them: [T, Hkv, G, D'] (G = 1 for "kv_group") in the dtype of the scores.

    "kv_group" adds up the scores of a KV head's queries, that is, scores their sum. Quest's bound
    sum_d max(q_d kmax_d, q_d kmin_d) is the dot product of [max(q, 0), min(q, 0)] with [kmax, kmin].
    """
    grouped = q.unflatten(1, (num_kv_heads, -1)).to(score_dtype(q.dtype))
    if pooling == "minmax":
        grouped = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], dim=-1)
    return grouped.sum(2, keepdim=True) if gate == "kv_group" else grouped


def route_torch(
    q: Tensor, means: Tensor, layout: BlockLayout, *, top_k: int, causal: bool, gate: str, pooling: str
) -> Tensor:
    """Chosen blocks int32 [T, R, columns], R = Hq or Hkv, columns = min(top_k, N); see moba.route."""
    tokens, num_kv_heads = q.shape[0], means.shape[1]
    heads = num_kv_heads if gate == "kv_group" else q.shape[1]
    columns = max(1, min(top_k, layout.num_blocks))
    routes = torch.full((tokens, heads, columns), -1, dtype=torch.int32, device=q.device)
    keys = means.to(score_dtype(q.dtype)).permute(1, 2, 0)  # [Hkv, D', N]
    tile = max(1, TILE_ELEMENTS // max(1, heads * layout.num_blocks))
    block = torch.arange(layout.num_blocks, device=q.device)
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        document, position = layout.query_places(start, stop)
        own = layout.own_blocks(document, position)
        routes[start:stop, :, 0] = own[:, None].int()
        if columns == 1:
            continue
        first, last = layout.first_block[document], layout.first_block[document + 1]
        # Without keys at its own position a query has only the document's blocks before it, which are all there are.
        limit = torch.where(own >= 0, own, last) if causal else last
        candidate = (block >= first[:, None]) & (block < limit[:, None]) & (block != own[:, None])
        queries = gate_queries(q[start:stop], num_kv_heads, gate, pooling)
        scores = torch.einsum("thgd,hdn->thgn", queries, keys).flatten(1, 2)
        routes[start:stop, :, 1:] = best_blocks(scores, candidate[:, None], columns - 1)
    return routes


def best_blocks(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """The `count` best candidates along the last axis, best first, ties to the higher index, -1 where there are fewer.

    Not-a-number ranks with +inf, so it spreads to the output instead of vanishing; a real -inf still beats no block.
    """
    lowest = torch.finfo(scores.dtype).min
    ranked = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest).masked_fill(~candidate, -torch.inf)
    order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = scores.shape[-1] - 1 - order
    return torch.where(candidate.expand_as(scores).gather(-1, chosen), chosen, -1).int()
