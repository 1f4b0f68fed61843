# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels that find where documents, blocks and tiles of queries lie: `BlockLayout` in two launches.

The same in plain torch takes some sixty operators, which is longer than the attention itself for short sequences.
Current blocks are attended by tiles of queries of one document and one block. So neither a batch of decoded tokens
walks the caches of its neighbours, nor does a number that is not finite reach another document.

Legend: T queries, S keys, docs documents, N blocks, BM queries per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout, PlacedBlocks
from neomoba_dist.model.attention.kernels.triton.common import kernel


class Documents(NamedTuple):
    """What kernels ask of the documents."""

    table: Tensor  # int32 [5, docs + 1]: cu_q, cu_k, q_offset, first block, first own tile
    documents: int
    block_size: int


class CurrentBlocks(NamedTuple):
    """Blocks of keys and the queries whose current blocks they are."""

    blocks: Tensor  # int32 [N, 5]: first key, length, first and last own query, place of the first one in the block
    tiles: Tensor  # int32 [tiles, 5]: first and last query, first and last key, key position less query number
    rows: int  # BM


@triton.jit
def border(cu_pointer, index, total):
    """cu_seqlens at an index; without it one document of `total` tokens."""
    value = tl.where(index > 0, total, 0)
    if cu_pointer is not None:
        value = tl.load(cu_pointer + index).to(tl.int32)
    return value


@kernel
def document_kernel(
    cu_q_pointer, cu_k_pointer, offset_pointer, table_pointer, queries, keys, documents, block_size, parts,
    BT: tl.constexpr,
):  # fmt: skip
    """The table of Documents, by one program."""
    width = documents + 1
    blocks, tiles = 0, 0
    for start in range(0, width, BT):
        index = start + tl.arange(0, BT)
        here, after = tl.minimum(index, documents), tl.minimum(index + 1, documents)
        q_start, k_start = border(cu_q_pointer, here, queries), border(cu_k_pointer, here, keys)
        q_length = border(cu_q_pointer, after, queries) - q_start
        k_length = border(cu_k_pointer, after, keys) - k_start
        offset = tl.zeros([BT], tl.int32)
        if offset_pointer is not None:
            offset = tl.load(offset_pointer + index, mask=index < documents, other=0).to(tl.int32)
        count = (k_length + block_size - 1) // block_size
        runs = (offset + q_length + block_size - 1) // block_size - offset // block_size
        runs = tl.where(q_length > 0, runs, 0) * parts
        entry, inside = table_pointer + index, index < width
        tl.store(entry, q_start, mask=inside)
        tl.store(entry + width, k_start, mask=inside)
        tl.store(entry + 2 * width, offset, mask=inside)
        tl.store(entry + 3 * width, blocks + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(entry + 4 * width, tiles + tl.cumsum(runs, 0) - runs, mask=inside)
        blocks += tl.sum(count, 0)
        tiles += tl.sum(runs, 0)


def describe_documents(layout: BlockLayout) -> Documents:
    """Documents of a layout, found now unless they are known."""
    placed = layout.placed
    known = placed is not None and placed.table.dtype == torch.int32
    table = placed.table if placed is not None and known else find_documents(layout, 1)
    return Documents(table, layout.documents, layout.block_size)


def find_documents(layout: BlockLayout, parts: int) -> Tensor:
    """The table of Documents; `parts` is the number of tiles of each current block."""
    cu_q, documents = layout.cu_seqlens, layout.documents
    cu_k = cu_q if layout.cu_seqlens_k is None else layout.cu_seqlens_k
    table = torch.empty(5, documents + 1, dtype=torch.int32, device=layout.device)
    document_kernel[(1,)](
        cu_q,
        cu_k,
        layout.offsets,
        table,
        layout.num_queries,
        layout.num_keys,
        documents,
        layout.block_size,
        parts,
        1024,
    )
    return table


@triton.jit
def document_of(borders, index, documents):
    """The document whose borders [docs + 1] hold each index; the last one beyond them. Empty documents hold none."""
    low = index * 0
    high = low + documents
    span = documents
    while span > 0:
        middle = (low + high) // 2
        after = tl.load(borders + middle + 1, mask=middle < documents, other=2147483647) <= index
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
        span = span // 2
    return tl.minimum(low, documents - 1)


@triton.jit
def block_span(table, documents, block, block_size):
    """(document, first key, length) of blocks; length 0 beyond the last one."""
    width = documents + 1
    document = document_of(table + 3 * width, block, documents)
    position = (block - tl.load(table + 3 * width + document)) * block_size
    start = tl.load(table + width + document) + position
    length = tl.load(table + width + document + 1) - start
    return document, start, tl.minimum(tl.maximum(length, 0), block_size)


@kernel
def current_blocks_kernel(
    table, spans_pointer, blocks_pointer, tiles_pointer, documents, block_size, num_blocks, num_tiles, parts,
    BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The two arrays of CurrentBlocks."""
    index = tl.program_id(0) * BT + tl.arange(0, BT)
    width = documents + 1
    # blocks
    document, start, length = block_span(table, documents, index, block_size)
    q_start, offset = tl.load(table + document), tl.load(table + 2 * width + document)
    tokens = tl.load(table + document + 1) - q_start
    position = start - tl.load(table + width + document)
    low = tl.minimum(tl.maximum(position - offset, 0), tokens)
    high = tl.minimum(tl.maximum(position + block_size - offset, 0), tokens)
    high = tl.where(length > 0, high, low)
    row, inside = blocks_pointer + index * 5, index < num_blocks
    if spans_pointer is not None:
        start = tl.load(spans_pointer + index * 2, mask=inside, other=0).to(tl.int32)
        length = tl.load(spans_pointer + index * 2 + 1, mask=inside, other=0).to(tl.int32)
        low = tl.zeros([BT], tl.int32)
        high = low
    tl.store(row, start, mask=inside)
    tl.store(row + 1, length, mask=inside)
    tl.store(row + 2, q_start + low, mask=inside)
    tl.store(row + 3, q_start + high, mask=inside)
    tl.store(row + 4, tl.maximum(offset - position, 0), mask=inside)
    # tiles
    document = document_of(table + 4 * width, index, documents)
    q_start, k_start = tl.load(table + document), tl.load(table + width + document)
    offset = tl.load(table + 2 * width + document)
    last = offset + tl.load(table + document + 1) - q_start
    part = index - tl.load(table + 4 * width + document)
    position = (offset // block_size + part // parts) * block_size
    first = tl.maximum(offset, position) + part % parts * BM
    stop = tl.minimum(tl.minimum(first + BM, position + block_size), last)
    key_last = tl.minimum(k_start + position + block_size, tl.load(table + width + document + 1))
    row, inside = tiles_pointer + index * 5, index < num_tiles
    tl.store(row, q_start + first - offset, mask=inside)
    tl.store(row + 1, q_start + stop - offset, mask=inside)
    tl.store(row + 2, k_start + position, mask=inside)
    tl.store(row + 3, key_last, mask=inside)
    tl.store(row + 4, k_start + offset - q_start, mask=inside)


def own_tiles(layout: BlockLayout, rows: int) -> tuple[int, int, int]:
    """Of tiles of current blocks: (queries, at most `rows`; tiles of a block; most tiles of all blocks)."""
    size, tokens = layout.block_size, layout.num_queries
    rows = min(rows, max(16, triton.next_power_of_2(min(size, tokens))))
    parts = triton.cdiv(min(size, tokens), rows)
    # An offset within a block lets each document start one block more.
    spread = size - 1 if layout.offsets is None else 2 * (size - 1)
    return rows, parts, min(tokens, (tokens + layout.documents * spread) // size) * parts


def place_blocks_triton(layout: BlockLayout, rows: int) -> PlacedBlocks:
    """Documents, and blocks with their own queries in tiles of at most `rows`, in two launches."""
    rows, parts, num_tiles = own_tiles(layout, rows)
    num_blocks = layout.num_blocks
    blocks = torch.empty(num_blocks, 5, dtype=torch.int32, device=layout.device)
    tiles = torch.empty(num_tiles, 5, dtype=torch.int32, device=layout.device)
    with torch.cuda.device_of(blocks):
        table = find_documents(layout, parts)
        current_blocks_kernel[(triton.cdiv(max(num_blocks, num_tiles), 128),)](
            table, layout.spans, blocks, tiles, layout.documents, layout.block_size, num_blocks, num_tiles, parts,
            rows, 128,
        )  # fmt: skip
    return PlacedBlocks(table, blocks, tiles)


def find_current_blocks(layout: BlockLayout, rows: int) -> CurrentBlocks:
    """CurrentBlocks in tiles of at most `rows` queries, found now unless they are known."""
    placed = layout.placed
    if placed is None or placed.blocks is None or placed.tiles is None:
        placed = place_blocks_triton(layout, rows)
    blocks, tiles = placed.blocks, placed.tiles
    rows, _, num_tiles = own_tiles(layout, rows)
    assert blocks is not None
    assert tiles is not None
    assert len(tiles) == num_tiles, "the blocks were placed for tiles of another size: see moba.place_blocks"
    return CurrentBlocks(blocks, tiles, rows)
