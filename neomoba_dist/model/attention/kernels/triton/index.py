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

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.triton.common import kernel

MOST_PARTS = 64  # sections x columns, unless there are more columns: a row of counts is one tile of scatter_kernel


class BlockIndex(NamedTuple):
    """Lists of queries by block; all int32."""

    queries: Tensor  # [R, C * T] query numbers, sorted by block
    slots: Tensor  # [T, R, C] where a query's column stands in `queries`; -1: it chose no block
    first: Tensor  # [R, N + 1] where each block's list begins
    tiles: Tensor  # [R, tiles, 4] first and last key, first and last place of each tile of a list; zeros past the last


class IndexShape(NamedTuple):
    """What the size of an index follows from; list_tile: BM."""

    tokens: int  # T
    rows: int  # R
    columns: int  # C
    num_blocks: int  # N
    list_tile: int

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of BlockIndex's tensors."""
        tokens, rows, columns, num_blocks, list_tile = self
        num_tiles = tokens * columns // list_tile + num_blocks
        return (rows, columns * tokens), (tokens, rows, columns), (rows, num_blocks + 1), (rows, num_tiles, 4)

    def length(self) -> int:
        """Elements of one buffer for all, each aligned to 16 bytes, so that no variant of a kernel follows from it."""
        return sum(-(-math.prod(shape) // 4) * 4 for shape in self.shapes()) if self.columns else 0

    def view(self, buffer: Tensor) -> BlockIndex:
        """The index in its buffer, int32 [length()]; without columns nothing is indexed, and nothing is read."""
        if not self.columns:
            return BlockIndex(*(buffer.new_empty(shape) for shape in self.shapes()))
        found, start = [], 0
        for shape in self.shapes():
            size = math.prod(shape)
            found.append(buffer[start : start + size].view(shape))
            start += -(-size // 4) * 4
        return BlockIndex(*found)


@kernel
def count_kernel(block_indices, counts, tokens, heads, columns, num_blocks, section, parts, BT: tl.constexpr):
    """counts [R, parts, N]: how many queries of a section chose a block in a column; integer sums know no order."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cells = counts + (row_head.to(tl.int64) * parts + part * (columns - 1) + column) * num_blocks
    for start in range(0, num_blocks, BT):
        block = start + tl.arange(0, BT)
        tl.store(cells + block, tl.zeros([BT], tl.int32), mask=block < num_blocks)
    tl.debug_barrier()
    for start in range(part * section, (part + 1) * section, BT):
        t = start + tl.arange(0, BT)
        chosen = block_indices + (t.to(tl.int64) * heads + row_head) * columns + 1 + column
        block = tl.load(chosen, mask=t < tokens, other=-1)
        tl.atomic_add(cells + block, tl.full([BT], 1, tl.int32), mask=block >= 0, sem="relaxed")


@triton.jit
def list_block(first, tiles, key, last_key, begin, length, block, inside, tile, BM: tl.constexpr):
    """Where the lists of some blocks begin, and the tiles of each, from number `tile` on."""
    tl.store(first + block, begin, mask=inside)
    needed = (length + BM - 1) // BM
    for extra in range(tl.max(needed, 0)):
        place, exists = begin + extra * BM, inside & (extra < needed)
        entry = tiles + (tile + extra) * 4
        tl.store(entry, key, mask=exists)
        tl.store(entry + 1, last_key, mask=exists)
        tl.store(entry + 2, place, mask=exists)
        tl.store(entry + 3, tl.minimum(place + BM, begin + length), mask=exists)


@triton.jit
def place_lists(
    counts, cells, blocks, first, tiles, mine, num_blocks, parts, num_tiles, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """cells [N]: where the queries of part `mine` begin in the list of every block; part 0 describes the lists too."""
    here, used = 0, 0
    for start in range(0, num_blocks, BN):
        block, part = start + tl.arange(0, BN), tl.arange(0, PARTS)
        inside = block < num_blocks
        there = (part < parts)[:, None] & inside[None, :]
        count = tl.load(counts + part[:, None] * num_blocks + block[None, :], mask=there, other=0)
        length = tl.sum(count, 0)
        begin = here + tl.cumsum(length, 0) - length
        tl.store(cells + block, begin + tl.sum(tl.where(part[:, None] < mine, count, 0), 0), mask=inside)
        needed = (length + BM - 1) // BM
        if mine == 0:
            key = tl.load(blocks + block * 5, mask=inside, other=0)
            last_key = key + tl.load(blocks + block * 5 + 1, mask=inside, other=0)
            tile = used + tl.cumsum(needed, 0) - needed
            list_block(first, tiles, key, last_key, begin, length, block, inside, tile, BM)
        here += tl.sum(length, 0)
        used += tl.sum(needed, 0)
    if mine == 0:
        tl.store(first + num_blocks, here)
        for start in range(used * 4, num_tiles * 4, 256):
            entry = start + tl.arange(0, 256)
            tl.store(tiles + entry, tl.zeros([256], tl.int32), mask=entry < num_tiles * 4)


@kernel
def scatter_kernel(
    block_indices, counts, cells, blocks, queries_pointer, slots, first, tiles, tokens, heads, columns, num_blocks,
    section, parts, num_tiles, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Write each query of a section at its place: where its (block, part) begins, plus its rank among them."""
    part, row_head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mine, row = part * (columns - 1) + column, row_head.to(tl.int64)
    own_cells = cells + (row * parts + mine) * num_blocks
    place_lists(counts + row * parts * num_blocks, own_cells, blocks, first + row * (num_blocks + 1),
                tiles + row * num_tiles * 4, mine, num_blocks, parts, num_tiles, BM, BN, PARTS)  # fmt: skip
    tl.debug_barrier()
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
        cell, there = own_cells + block, block >= 0
        place = tl.load(cell, mask=there, other=0, volatile=True) + rank
        tl.store(queries_pointer + row * tokens * (columns - 1) + place, t, mask=there)
        slot = slots + (t.to(tl.int64) * heads + row_head) * (columns - 1) + column
        tl.store(slot, tl.where(there, place, -1), mask=t < tokens)
        if section > BT:  # the next tile of this section comes after what was placed here
            tl.debug_barrier()
            tl.atomic_add(cell, tl.full([BT], 1, tl.int32), mask=there, sem="relaxed")
            tl.debug_barrier()


def index_shape(block_indices: Tensor, num_blocks: int, list_tile: int) -> IndexShape:
    """Of the index of block_indices [T, R, 1 + C] in tiles of `list_tile` queries."""
    tokens, rows, columns = block_indices.shape
    return IndexShape(tokens, rows, columns - 1, num_blocks, list_tile)


def build_index(block_indices: Tensor, blocks: Tensor, list_tile: int, query_tile: int = 512) -> Tensor:
    """Index all columns but the first of block_indices int32 [T, R, columns], in two launches: IndexShape's buffer.

    blocks: int32 [N, 5], those of `layout.CurrentBlocks`.
    """
    (tokens, heads, columns), num_blocks = block_indices.shape, len(blocks)
    shape = index_shape(block_indices, num_blocks, list_tile)
    buffer, indexed = block_indices.new_empty(shape.length()), columns - 1
    if indexed == 0:
        return buffer
    index = shape.view(buffer)
    most_sections = max(1, MOST_PARTS // indexed)
    section = triton.cdiv(triton.cdiv(tokens, query_tile), most_sections) * query_tile
    sections = triton.cdiv(tokens, section)
    parts = sections * indexed
    counts, cells = (block_indices.new_empty(heads, parts, num_blocks) for _ in range(2))
    sizes, grid = (tokens, heads, columns, num_blocks, section, parts), (sections, heads, indexed)
    count_kernel[grid](block_indices, counts, *sizes, query_tile, num_warps=8)
    scatter_kernel[grid](
        block_indices, counts, cells, blocks, *index, *sizes, index.tiles.shape[1], list_tile, 64,
        max(MOST_PARTS, triton.next_power_of_2(indexed)), query_tile, 32, num_warps=8, num_stages=1,
    )  # fmt: skip
    return buffer
