# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels that turn "query -> blocks" into "block -> queries": the index that attention kernels gather by.

One list per column of the routing and head, sorted by block, queries ascending. Each query stands at most once in each
column, so a kernel that runs column after column may update a query's sums in place: no atomics on floats, the same
bits every time. The build is a counting sort: counts per (block, section of the queries), a cumulative sum, ranks by
comparison within a tile. Sections are at most 64, so that the counts grow with T and not with its square; one program
goes through the tiles of a section in turn.

Legend: T queries, N blocks, R rows of the routing, C columns that are indexed (all but that of the own block), BT
queries per tile, BC per comparison, BM queries per tile of a list, BN blocks at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.triton.common import kernel


class RouteIndex(NamedTuple):
    """Lists of queries by block; all int32."""

    rows: Tensor  # [C, R, T] query numbers
    first: Tensor  # [C, R, N + 1] where each block's list begins in `rows`
    tile_block: Tensor  # [C, R, tiles] block of each tile of a list, N past the last tile
    first_tile: Tensor  # [C, R, N + 1] number of each block's first tile


@kernel
def count_kernel(routes, counts, tokens, heads, columns, num_blocks, section, sections, BT: tl.constexpr):
    """counts [C, R, N, sections]: how many queries of a section chose a block; integer sums know no order."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (column * heads + row_head).to(tl.int64)
    for start in range(part * section, (part + 1) * section, BT):
        t = start + tl.arange(0, BT)
        chosen = routes + (t.to(tl.int64) * heads + row_head) * columns + 1 + column
        block = tl.load(chosen, mask=t < tokens, other=-1)
        cell = (row * num_blocks + block) * sections + part
        tl.atomic_add(counts + cell, tl.full([BT], 1, tl.int32), mask=block >= 0, sem="relaxed")


@kernel
def list_kernel(
    cells, first, tile_block, first_tile, heads, num_blocks, sections, num_tiles, BM: tl.constexpr, BN: tl.constexpr,
    SECTIONS: tl.constexpr,
):  # fmt: skip
    """Turn the counts into the places where each section's queries begin, and find the lists and their tiles."""
    row = tl.program_id(1) * heads + tl.program_id(0)
    here, tiles = 0, 0
    for start in range(0, num_blocks, BN):
        block, section = start + tl.arange(0, BN), tl.arange(0, SECTIONS)
        inside = block < num_blocks
        cell = cells + (row.to(tl.int64) * num_blocks + block)[:, None] * sections + section[None, :]
        there = inside[:, None] & (section < sections)[None, :]
        count = tl.load(cell, mask=there, other=0)
        length = tl.sum(count, 1)
        begin = here + tl.cumsum(length, 0) - length
        tl.store(cell, begin[:, None] + tl.cumsum(count, 1) - count, mask=there)
        tl.store(first + row * (num_blocks + 1) + block, begin, mask=inside)
        needed = (length + BM - 1) // BM
        tile = tiles + tl.cumsum(needed, 0) - needed
        tl.store(first_tile + row * (num_blocks + 1) + block, tile, mask=inside)
        for extra in range(tl.max(needed, 0)):
            tl.store(tile_block + row * num_tiles + tile + extra, block, mask=inside & (extra < needed))
        here += tl.sum(length, 0)
        tiles += tl.sum(needed, 0)
    tl.store(first + row * (num_blocks + 1) + num_blocks, here)
    tl.store(first_tile + row * (num_blocks + 1) + num_blocks, tiles)
    for start in range(tiles, num_tiles, 256):
        tile = start + tl.arange(0, 256)
        tl.store(tile_block + row * num_tiles + tile, tl.zeros([256], tl.int32) + num_blocks, mask=tile < num_tiles)


@kernel
def scatter_kernel(
    routes, cells, rows, tokens, heads, columns, num_blocks, section, sections, BT: tl.constexpr, BC: tl.constexpr
):
    """Write each query of a section at its place: where its (block, section) begins, plus its rank among them."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = routes + row_head * columns + 1 + column
    step = heads * columns
    row = (column * heads + row_head).to(tl.int64)
    for start in range(part * section, (part + 1) * section, BT):
        t = start + tl.arange(0, BT)
        block = tl.load(base + t.to(tl.int64) * step, mask=t < tokens, other=-1)
        rank = tl.zeros([BT], tl.int32)
        for other_start in range(start, start + BT, BC):
            other = other_start + tl.arange(0, BC)
            other_block = tl.load(base + other.to(tl.int64) * step, mask=other < tokens, other=-2)
            same = (block[:, None] == other_block[None, :]) & (other[None, :] < t[:, None])
            rank += tl.sum(same.to(tl.int32), 1)
        cell = cells + (row * num_blocks + block) * sections + part
        there = block >= 0
        place = tl.load(cell, mask=there, other=0, volatile=True) + rank
        tl.store(rows + row * tokens + place, t, mask=there)
        if section > BT:  # the next tile of this section comes after what was placed here
            tl.debug_barrier()
            tl.atomic_add(cell, tl.full([BT], 1, tl.int32), mask=there, sem="relaxed")
            tl.debug_barrier()


def build_index(
    routes: Tensor, num_blocks: int, list_tile: int, query_tile: int = 512, most_sections: int = 64
) -> RouteIndex:
    """Index all columns but the first of routes int32 [T, R, columns] in tiles of `list_tile` queries."""
    routes = routes.contiguous()
    tokens, heads, columns = routes.shape
    section = triton.cdiv(triton.cdiv(tokens, query_tile), most_sections) * query_tile
    sections = triton.cdiv(tokens, section)
    shape, num_tiles = (columns - 1, heads), tokens // list_tile + num_blocks
    cells = routes.new_zeros(*shape, num_blocks, sections)
    widths = (tokens, num_blocks + 1, num_tiles, num_blocks + 1)
    index = RouteIndex(*(routes.new_empty(*shape, width) for width in widths))
    if columns == 1:
        return index
    sizes, grid = (tokens, heads, columns, num_blocks, section, sections), (sections, heads, columns - 1)
    count_kernel[grid](routes, cells, *sizes, query_tile, num_warps=8)
    list_kernel[(heads, columns - 1)](
        cells, *index[1:], heads, num_blocks, sections, num_tiles, list_tile, 64, triton.next_power_of_2(most_sections),
        num_warps=8,
    )  # fmt: skip
    scatter_kernel[grid](routes, cells, index.rows, *sizes, query_tile, 32, num_warps=8, num_stages=1)
    return index
