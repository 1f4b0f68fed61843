"""Block representatives and the gate on the CPU, where reading `cu_seqlens` is free: no work on impossible blocks.

The same results as kernels/select.py, tile by tile of queries against just the blocks that they may choose.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks, R rows of the selection.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu.threads import one_thread, run_side_by_side
from neomoba_dist.model.attention.kernels.layout import BlockLayout
from neomoba_dist.model.attention.kernels.select import (
    best_blocks,
    empty_block_indices,
    gate_queries,
    pool_keys,
    pooled_width,
    score_dtype,
)

TILE_QUERIES = 512
TILE_ELEMENTS = 1 << 20  # scores of one tile
SMALL_SELECTION = 1 << 15  # rows up to which threads only wait for each other
POOLED_ELEMENTS = 1 << 22  # keys pooled by one task


def block_means_cpu(k: Tensor, layout: BlockLayout, pooling: str) -> Tensor:
    """Block summaries [N, Hkv, D or 2 D] in the key dtype; rows of blocks that do not exist are zero."""
    means = k.new_zeros(layout.num_blocks, k.shape[1], pooled_width(k.shape[2], pooling))
    block_size = layout.block_size
    step = max(1, POOLED_ELEMENTS // max(1, block_size * k.shape[1] * k.shape[2]))
    tasks = []
    for place in layout.places():
        start, stop, first = place.keys.start, place.keys.stop, place.blocks.start
        whole = (stop - start) // block_size
        for low in range(0, whole, step):
            high = min(low + step, whole)
            keys = k[start + low * block_size : start + high * block_size].unflatten(0, (-1, block_size))
            tasks.append(partial(_pool_into, means[first + low : first + high], keys, pooling))
        if start + whole * block_size < stop:
            tasks.append(partial(_pool_into, means[first + whole], k[start + whole * block_size : stop], pooling))
    run_side_by_side(tasks)
    return means


def _pool_into(means: Tensor, keys: Tensor, pooling: str) -> None:
    means.copy_(pool_keys(keys, pooling))


def select_blocks_cpu(
    q: Tensor, means: Tensor, layout: BlockLayout, *, top_k: int, causal: bool, gate: str, pooling: str
) -> Tensor:
    """Chosen blocks int32 [T, R, columns]; see moba.select_blocks."""
    with one_thread():
        block_indices = empty_block_indices(q, means, top_k, gate)
        keys_HDN = means.to(score_dtype(q.dtype)).permute(1, 2, 0).contiguous()
    block_size, heads = layout.block_size, block_indices.shape[1]
    tasks = []
    for place in layout.places():
        start, stop, (first, last) = place.queries.start, place.queries.stop, (place.blocks.start, place.blocks.stop)
        rows = max(1, min(TILE_QUERIES, TILE_ELEMENTS // max(1, heads * (last - first))))
        height = max(1, rows // block_size) * block_size if block_size <= rows else rows
        for low in range(start, stop, height):
            tile = slice(low, min(low + height, stop))
            at = place.position + low - start
            tasks.append(
                partial(
                    _select_tile, q, keys_HDN, block_indices, tile, at, first, last, block_size, causal, gate, pooling
                )
            )
    run_side_by_side(tasks, alone=q.shape[0] * heads <= SMALL_SELECTION)
    return block_indices


def _select_tile(
    q: Tensor,
    keys_HDN: Tensor,
    block_indices: Tensor,
    tile: slice,
    position: int,
    first: int,
    last: int,
    block_size: int,
    causal: bool,
    gate: str,
    pooling: str,
) -> None:
    """Blocks of consecutive queries of one document, whose blocks are first..last; the first query is at `position`."""
    tokens = tile.stop - tile.start
    own = first + torch.arange(position, position + tokens) // block_size
    lowest, highest = first + position // block_size, first + (position + tokens - 1) // block_size
    block_indices[tile, :, 0] = own.masked_fill(own >= last, -1)[:, None].int()
    stop = min(highest, last) if causal else last
    if stop <= first or block_indices.shape[2] == 1:
        return
    queries = gate_queries(q[tile], keys_HDN.shape[0], gate, pooling).permute(1, 0, 2, 3)  # [Hkv, tokens, G, D']
    scores = torch.bmm(queries.flatten(1, 2), keys_HDN[:, :, first:stop])
    candidate = None  # a tile within one block of a causal document may choose any block before it
    if not causal or lowest != highest:
        block = torch.arange(first, stop)
        allowed = block < own[:, None] if causal else block != own[:, None]
        candidate = allowed.repeat_interleave(queries.shape[2], dim=0)
    chosen = best_blocks(scores, candidate, block_indices.shape[2] - 1)
    chosen = torch.where(chosen >= 0, chosen + first, -1).unflatten(1, (tokens, -1))
    block_indices[tile, :, 1:] = chosen.transpose(0, 1).flatten(1, 2)
