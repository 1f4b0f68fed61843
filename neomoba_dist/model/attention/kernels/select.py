"""Block representatives and the gate in plain torch, for any device: which blocks does each query attend to?

The gate (Lu et al., MoBA, arXiv 2502.13189, section 2.2) scores a block by the dot product of the query with a summary
of the block's keys and keeps the `top_k` best, the query's current block always among them. It has no gradient.

Nothing here copies a value from the device; cpu/select.py does the same faster where reading values is free.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks, R rows of the selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout

POOLINGS = ("mean", "max", "minmax", "representative")
GATES = ("per_head", "kv_group")
TILE_ELEMENTS = 1 << 22  # scores held at a time; 16 MiB in float32
NARROW = 32  # up to so many blocks, maxima run faster over the first axis than over the last
PICKS = 16  # up to so many blocks are picked one by one, more by sorting


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and lse: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def isolate_damaged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [S, ..., D] such that a damaged value reaches the queries that attend to its key, and no others.

    A weight of 0 times not-a-number would reach all; a score of not-a-number is masked where the key is not seen.
    """
    damaged = ~v.isfinite().all(-1, keepdim=True)
    return k.masked_fill(damaged, torch.nan), v.masked_fill(damaged, 0)


def pool_keys(k: Tensor, pooling: str) -> Tensor:
    """Summarise keys [..., length, Hkv, D] of whole blocks over `length`: [..., Hkv, D], or 2 D for "minmax".

    Sums run in float32 (float64 for float64) and the mean is rounded to the key dtype, as the paper's code does;
    with unrounded means the routing of 0.2 % of the queries flips in bfloat16.
    """
    if pooling == "mean":
        return k.mean(-3, dtype=score_dtype(k.dtype)).to(k.dtype)
    if pooling == "max":
        return k.amax(-3)
    if pooling == "minmax":
        return torch.cat([k.amax(-3), k.amin(-3)], dim=-1)
    return k[..., -1, :, :].contiguous()


def pooled_width(head_dim: int, pooling: str) -> int:
    """Numbers that stand for one block at the gate."""
    return 2 * head_dim if pooling == "minmax" else head_dim


def block_means_any(k: Tensor, layout: BlockLayout, pooling: str) -> Tensor:
    """Block summaries [N, Hkv, D or 2 D] in the key dtype; rows of blocks that do not exist are zero."""
    num_keys, num_kv_heads, head_dim = k.shape
    means = k.new_zeros(layout.num_blocks, num_kv_heads, pooled_width(head_dim, pooling))
    starts, lengths = layout.block_spans()
    offset = torch.arange(layout.block_size, device=k.device)
    step = max(1, TILE_ELEMENTS // (layout.block_size * num_kv_heads * head_dim))
    for first in range(0, layout.num_blocks, step):
        start, length = (x[first : first + step, None] for x in (starts, lengths))
        # A short block repeats its last key: that changes neither a maximum nor, weighted with 0, a mean.
        keys = k[(start + torch.minimum(offset, length - 1)).clamp(0, num_keys - 1)]
        if pooling == "mean":
            inside = (offset < length)[..., None, None]
            total = keys.to(score_dtype(k.dtype)).mul(inside).sum(1)
            pooled = (total / length.clamp(min=1)[..., None]).to(k.dtype)
        else:
            pooled = pool_keys(keys, pooling)
        means[first : first + step] = pooled.masked_fill((length == 0)[..., None], 0)
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


def selection_shape(q: Tensor, means: Tensor, top_k: int, gate: str) -> tuple[int, int, int]:
    """[T, R, columns] of the selection, R = Hq or Hkv, columns = min(top_k, N)."""
    heads = means.shape[1] if gate == "kv_group" else q.shape[1]
    return q.shape[0], heads, max(1, min(top_k, means.shape[0]))


def empty_block_indices(q: Tensor, means: Tensor, top_k: int, gate: str) -> Tensor:
    """int32 [T, R, columns] without any block."""
    return torch.full(selection_shape(q, means, top_k, gate), -1, dtype=torch.int32, device=q.device)


def select_blocks_any(
    q: Tensor, means: Tensor, layout: BlockLayout, *, top_k: int, causal: bool, gate: str, pooling: str
) -> Tensor:
    """Chosen blocks int32 [T, R, columns]; see moba.select_blocks."""
    block_indices = empty_block_indices(q, means, top_k, gate)
    tokens, heads, columns = block_indices.shape
    keys = means.to(score_dtype(q.dtype)).permute(1, 2, 0)  # [Hkv, D', N]
    block = torch.arange(means.shape[0], device=q.device)
    tile = max(1, TILE_ELEMENTS // max(1, heads * means.shape[0]))
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        document, position = layout.query_positions(start, stop)
        own = layout.current_blocks(document, position)
        block_indices[start:stop, :, 0] = own[:, None]
        if columns == 1:
            continue
        first, last = layout.first_block[document], layout.first_block[document + 1]
        # A query whose current block has no keys here comes after all of its document's blocks.
        limit = torch.where(own >= 0, own, last) if causal else last
        candidate = (block >= first[:, None]) & (block < limit[:, None]) & (block != own[:, None])
        scores = torch.einsum("thgd,hdn->thgn", gate_queries(q[start:stop], means.shape[1], gate, pooling), keys)
        block_indices[start:stop, :, 1:] = best_blocks(scores.flatten(1, 2), candidate[:, None], columns - 1)
    return block_indices


def best_blocks(scores: Tensor, candidate: Tensor | None, count: int) -> Tensor:
    """The `count` best candidates (None: all) along the last axis, best first: indices, -1 where there are fewer.

    Ties go to the higher index. Not-a-number ranks with +inf, so it spreads to the output instead of vanishing, and a
    real -inf still beats no block.
    """
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    if candidate is not None:
        scores.masked_fill_(~candidate, -torch.inf)
    width = scores.shape[-1]
    if count > PICKS:
        ranked = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
        indices = (width - 1 - ranked.indices[..., :count]).masked_fill_(ranked.values[..., :count] == -torch.inf, -1)
        return torch.nn.functional.pad(indices, (0, count - indices.shape[-1]), value=-1)
    axis = -1 if width > NARROW else 0
    scores = scores.movedim(-1, axis).contiguous()
    index = torch.arange(width, dtype=torch.int32, device=scores.device)
    index = index if axis else index.view(-1, *[1] * (scores.dim() - 1))
    none = torch.full((), -1, dtype=torch.int32, device=scores.device)
    picks = []
    for _ in range(count):  # a maximum and an equality run ten times faster than topk, and know the rule for ties
        best = scores.amax(axis, keepdim=True)
        pick = torch.where(scores == best, index, none).amax(axis, keepdim=True)
        picks.append(pick.masked_fill(best == -torch.inf, -1))
        scores.scatter_(axis, pick.long(), -torch.inf)
    return torch.cat(picks, dim=axis).movedim(axis, -1)
