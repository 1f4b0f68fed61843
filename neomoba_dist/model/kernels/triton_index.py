# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels that turn "query -> blocks" into "block -> queries": the index that attention kernels gather by.

One list per column of the routing and head, sorted by block, queries ascending. Each query stands at most once in each
column, so a kernel that runs column after column may update a query's sums in place: no atomics on floats, the same
bits every time. The build is a counting sort: counts per (block, tile of queries), one cumulative sum, ranks by
comparison.

Legend: T queries, N blocks, R rows of the routing, C columns that are indexed, BT queries per tile, BC per comparison.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.kernels.triton_common import kernel


class RouteIndex(NamedTuple):
    """Lists of queries by block; all int32."""

    rows: Tensor  # [C, R, T] query numbers
    first: Tensor  # [C, R, N + 1] where each block's list begins in `rows`
    tile_block: Tensor  # [C, R, tiles] block of each tile of a list, N past the last tile
    first_tile: Tensor  # [C, R, N + 1] number of each block's first tile


@kernel
def count_kernel(routes, counts, tokens, heads, columns, first_column, num_blocks, num_tiles, BT: tl.constexpr):
    """counts [C, R, N, tiles]: how many queries of a tile chose a block; integer sums do not depend on their order."""
    tile, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tile * BT + tl.arange(0, BT)
    chosen = routes + (t.to(tl.int64) * heads + row_head) * columns + first_column + column
    block = tl.load(chosen, mask=t < tokens, other=-1)
    base = ((column * heads + row_head).to(tl.int64) * num_blocks + block) * num_tiles + tile
    tl.atomic_add(counts + base, tl.full([BT], 1, tl.int32), mask=block >= 0)


@kernel
def scatter_kernel(
    routes, ends, counts, rows, tokens, heads, columns, first_column, num_blocks, num_tiles, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Write each query at its place: the end of its (block, tile) less the tile's count, plus its rank in the tile."""
    tile, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tile * BT + tl.arange(0, BT)
    base = routes + row_head * columns + first_column + column
    step = heads * columns
    block = tl.load(base + t.to(tl.int64) * step, mask=t < tokens, other=-1)
    rank = tl.zeros([BT], tl.int32)
    for start in range(0, BT, BC):
        other = tile * BT + start + tl.arange(0, BC)
        other_block = tl.load(base + other.to(tl.int64) * step, mask=other < tokens, other=-2)
        same = (block[:, None] == other_block[None, :]) & (other[None, :] < t[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    row = (column * heads + row_head).to(tl.int64)
    cell = (row * num_blocks + block) * num_tiles + tile
    there = block >= 0
    place = tl.load(ends + cell, mask=there, other=0) - tl.load(counts + cell, mask=there, other=0) + rank
    tl.store(rows + row * tokens + place, t, mask=there)


def build_index(
    routes: Tensor, num_blocks: int, first_column: int, list_tile: int, query_tile: int = 512
) -> RouteIndex:
    """Index the columns from `first_column` of routes int32 [T, R, columns] in tiles of `list_tile` queries."""
    routes = routes.contiguous()
    tokens, heads, columns = routes.shape
    indexed = columns - first_column
    num_tiles = triton.cdiv(tokens, query_tile)
    grid = (num_tiles, heads, indexed)
    counts = torch.zeros(indexed, heads, num_blocks, num_tiles, dtype=torch.int32, device=routes.device)
    sizes = (tokens, heads, columns, first_column, num_blocks, num_tiles)
    count_kernel[grid](routes, counts, *sizes, query_tile, num_warps=8)
    ends = counts.flatten(2).cumsum(-1, dtype=torch.int32).view_as(counts)
    rows = torch.empty(indexed, heads, tokens, dtype=torch.int32, device=routes.device)
    scatter_kernel[grid](routes, ends, counts, rows, *sizes, query_tile, 32, num_warps=8)
    first = torch.nn.functional.pad(ends[..., -1], (1, 0))
    lists = (first.diff() + list_tile - 1) // list_tile
    last_tile = lists.cumsum(-1, dtype=torch.int32)
    tiles = torch.arange(tokens // list_tile + num_blocks, dtype=torch.int32, device=routes.device)
    tile_block = torch.searchsorted(
        last_tile, tiles.expand(indexed, heads, -1).contiguous(), right=True, out_int32=True
    )
    return RouteIndex(rows, first, tile_block, torch.nn.functional.pad(last_tile, (1, 0)))
