# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels that turn "query -> blocks" into "block -> queries": the index that attention kernels gather by.

For each row of the selection, one list holds the queries of all columns sorted by block. What a kernel computes for an
entry of the list lies at the entry's own place, so that no two programs write to one row: no atomics on floats, the
same bits every time; `slots` finds a query's places again. The build is a counting sort: counts per (block, section of
the queries, column), a cumulative sum, ranks by comparison within a tile. One program goes through the tiles of a
section in turn, and there are at most 64 sections x columns, so that the counts grow with T and not with its square.

Legend: T queries, N blocks, R rows of the selection, C columns that are indexed (all but that of the current block), BT
queries per tile, BC per comparison, BM queries per tile of a list, BN blocks at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.triton.common import kernel

MOST_PARTS = 64  # sections x columns, unless there are more columns: a row of counts is one tile of list_kernel


class BlockIndex(NamedTuple):
    """Lists of queries by block; all int32."""

    queries: Tensor  # [R, C * T] query numbers, sorted by block
    slots: Tensor  # [T, R, C] where a query's column stands in `queries`; -1: it chose no block
    first: Tensor  # [R, N + 1] where each block's list begins
    tiles: Tensor  # [R, tiles, 4] first and last key, first and last place of each tile of a list; zeros past the last


@kernel
def count_kernel(block_indices, counts, tokens, heads, columns, num_blocks, section, parts, BT: tl.constexpr):
    """counts [R, N, parts]: how many queries of a section chose a block in a column; integer sums know no order."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    for start in range(part * section, (part + 1) * section, BT):
        t = start + tl.arange(0, BT)
        chosen = block_indices + (t.to(tl.int64) * heads + row_head) * columns + 1 + column
        block = tl.load(chosen, mask=t < tokens, other=-1)
        cell = (row_head.to(tl.int64) * num_blocks + block) * parts + part * (columns - 1) + column
        tl.atomic_add(counts + cell, tl.full([BT], 1, tl.int32), mask=block >= 0, sem="relaxed")


@kernel
def list_kernel(
    cells, blocks, first, tiles, num_blocks, parts, num_tiles, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr
):
    """Turn the counts into the places where each part's queries begin, and describe the tiles of every list."""
    row = tl.program_id(0)
    here, used = 0, 0
    for start in range(0, num_blocks, BN):
        block, part = start + tl.arange(0, BN), tl.arange(0, PARTS)
        inside = block < num_blocks
        cell = cells + (row.to(tl.int64) * num_blocks + block)[:, None] * parts + part[None, :]
        there = inside[:, None] & (part < parts)[None, :]
        count = tl.load(cell, mask=there, other=0)
        length = tl.sum(count, 1)
        begin = here + tl.cumsum(length, 0) - length
        tl.store(cell, begin[:, None] + tl.cumsum(count, 1) - count, mask=there)
        tl.store(first + row * (num_blocks + 1) + block, begin, mask=inside)
        needed = (length + BM - 1) // BM
        tile = tiles + (row * num_tiles + used + tl.cumsum(needed, 0) - needed) * 4
        key = tl.load(blocks + block * 5, mask=inside, other=0)
        last_key = key + tl.load(blocks + block * 5 + 1, mask=inside, other=0)
        for extra in range(tl.max(needed, 0)):
            place, exists = begin + extra * BM, inside & (extra < needed)
            tl.store(tile + extra * 4, key, mask=exists)
            tl.store(tile + extra * 4 + 1, last_key, mask=exists)
            tl.store(tile + extra * 4 + 2, place, mask=exists)
            tl.store(tile + extra * 4 + 3, tl.minimum(place + BM, begin + length), mask=exists)
        here += tl.sum(length, 0)
        used += tl.sum(needed, 0)
    tl.store(first + row * (num_blocks + 1) + num_blocks, here)
    for start in range(used * 4, num_tiles * 4, 256):
        entry = start + tl.arange(0, 256)
        tl.store(tiles + row * num_tiles * 4 + entry, tl.zeros([256], tl.int32), mask=entry < num_tiles * 4)


@kernel
def scatter_kernel(
    block_indices, cells, queries_pointer, slots, tokens, heads, columns, num_blocks, section, parts, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Write each query of a section at its place: where its (block, part) begins, plus its rank among them."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = block_indices + row_head * columns + 1 + column
    step = heads * columns
    for start in range(part * section, (part + 1) * section, BT):
        t = start + tl.arange(0, BT)
        block = tl.load(base + t.to(tl.int64) * step, mask=t < tokens, other=-1)
        rank = tl.zeros([BT], tl.int32)
        for other_start in range(start, start + BT, BC):
            other = other_start + tl.arange(0, BC)
            other_block = tl.load(base + other.to(tl.int64) * step, mask=other < tokens, other=-2)
            same = (block[:, None] == other_block[None, :]) & (other[None, :] < t[:, None])
            rank += tl.sum(same.to(tl.int32), 1)
        cell = cells + (row_head.to(tl.int64) * num_blocks + block) * parts + part * (columns - 1) + column
        there = block >= 0
        place = tl.load(cell, mask=there, other=0, volatile=True) + rank
        tl.store(queries_pointer + row_head.to(tl.int64) * tokens * (columns - 1) + place, t, mask=there)
        slot = slots + (t.to(tl.int64) * heads + row_head) * (columns - 1) + column
        tl.store(slot, tl.where(there, place, -1), mask=t < tokens)
        if section > BT:  # the next tile of this section comes after what was placed here
            tl.debug_barrier()
            tl.atomic_add(cell, tl.full([BT], 1, tl.int32), mask=there, sem="relaxed")
            tl.debug_barrier()


def build_index(block_indices: Tensor, blocks: Tensor, list_tile: int, query_tile: int = 512) -> BlockIndex:
    """Index all columns but the first of block_indices int32 [T, R, columns] in tiles of `list_tile` queries.

    blocks: int32 [N, 5], those of `layout.CurrentBlocks`.
    """
    (tokens, heads, columns), num_blocks = block_indices.shape, len(blocks)
    indexed = columns - 1
    most_sections = max(1, MOST_PARTS // max(1, indexed))
    section = triton.cdiv(triton.cdiv(tokens, query_tile), most_sections) * query_tile
    sections = triton.cdiv(tokens, section)
    parts, num_tiles = sections * indexed, tokens * indexed // list_tile + num_blocks
    index = BlockIndex(
        block_indices.new_empty(heads, indexed * tokens),
        block_indices.new_empty(tokens, heads, indexed),
        block_indices.new_empty(heads, num_blocks + 1),
        block_indices.new_empty(heads, num_tiles if indexed else 0, 4),
    )
    if indexed == 0:
        return index
    cells = block_indices.new_zeros(heads, num_blocks, parts)
    sizes, grid = (tokens, heads, columns, num_blocks, section, parts), (sections, heads, indexed)
    count_kernel[grid](block_indices, cells, *sizes, query_tile, num_warps=8)
    list_kernel[(heads,)](
        cells, blocks, index.first, index.tiles, num_blocks, parts, num_tiles, list_tile, 64,
        max(MOST_PARTS, triton.next_power_of_2(indexed)), num_warps=8,
    )  # fmt: skip
    scatter_kernel[grid](
        block_indices, cells, index.queries, index.slots, *sizes, query_tile, 32, num_warps=8, num_stages=1
    )
    return index
