"""Which queries meet which keys in one KV head of one document: the work list of MoBA's CPU path.

MoBA is a list of small unmasked attentions: the queries that chose a block, gathered, against the keys of that block.
The causal triangle of the current blocks is cut into small diagonal tiles and unmasked rectangles, because a masked
512 x 512 block costs twice what its triangle needs; the same piece of all whole blocks is one batch.

Legend: a row is one (query token, query head of the group) pair, row = token * G + head, and one more row of zeros
stands at the end to pad lists; keys count from the start of the document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # edge of the causal diagonal's tiles
ITEM_ELEMENTS = 1 << 19  # logits of one item; twice one core's second-level cache, but half as many operator calls
LARGE_TILE = 1 << 16  # logits from which oneDNN's single product is faster than torch.bmm's
MAX_KEYS = 512
# Lists of rows are padded to a multiple of this: oneDNN compiles and keeps a kernel for every shape that it meets.
ROW_STEP = 64


class RowTiles(NamedTuple):
    """`number` ranges of rows, each `height` long, `step` apart."""

    start: int
    height: int
    step: int
    number: int

    def view(self, x: Tensor) -> Tensor:
        """Those rows of x [R, ...]: [count, height, ...] without a copy."""
        stride = x.stride(0)
        size = (self.number, self.height, *x.shape[1:])
        return x.as_strided(size, (self.step * stride, *x.stride()), x.storage_offset() + self.start * stride)


RowSelection = slice | Tensor | RowTiles  # consecutive rows, int64 row numbers, or a batch of tiles


class Item(NamedTuple):
    """RowSelection that attend to the keys key_start..key_stop, causally masked by position if `masked`."""

    rows: slice | Tensor
    key_start: int
    key_stop: int
    masked: bool = False


class TileItem(NamedTuple):
    """Tiles of rows, each of which attends to its tile of keys, causally masked if `masked` (the tiles are square)."""

    rows: RowTiles
    keys: RowTiles
    masked: bool

    def split(self) -> Iterator[Item]:
        """The tiles one by one, for those that nothing masks."""
        for index in range(self.rows.number):
            row, key = (part.start + index * part.step for part in (self.rows, self.keys))
            yield Item(slice(row, row + self.rows.height), key, key + self.keys.height)


class WorkList(NamedTuple):
    """The pieces of all whole current blocks, and everything else."""

    tiles: list[TileItem]
    items: list[Item]


class PlannedQueries(NamedTuple):
    """The planned queries of one document: tokens start..stop of `q`, the first at `position`; keys of the document."""

    start: int
    stop: int
    position: int
    num_keys: int
    block_size: int
    causal: bool
    key_spans: list[tuple[int, int]] | None = None  # first and last key of every block, where they are not counted


def list_work(queries: PlannedQueries, block_indices_TGC: Tensor, first_block: int) -> WorkList:
    """The work list of one KV head.

    Args:
        block_indices_TGC: int [tokens, G, columns], global block numbers, -1 for none.
    """
    if not queries.causal:
        return WorkList([], list(selected_items(queries, block_indices_TGC, first_block)))
    own = block_indices_TGC[:, :, 0] >= 0
    others = selected_items(queries, block_indices_TGC[:, :, 1:], first_block)
    if not bool(own.all()) or queries.position + queries.stop - queries.start > queries.num_keys:
        return WorkList([], [*partial_current_items(queries, own), *others])
    tiles, items = current_items(queries, block_indices_TGC.shape[1])
    return WorkList(tiles, [*items, *others])


def tile_edge(block_size: int) -> int:
    """Edge of the diagonal's tiles: a divisor of the block where there is a good one, so that tiles are alike."""
    divisors = (edge for edge in range(min(TILE, block_size), TILE // 4, -1) if block_size % edge == 0)
    return next(divisors, min(TILE, block_size))


def current_items(queries: PlannedQueries, group: int) -> tuple[list[TileItem], list[Item]]:
    """Current blocks, all causal: batches of pieces of whole blocks, and the pieces of a cut first or last block."""
    block_size, first, last = queries.block_size, queries.position, queries.position + queries.stop - queries.start
    low = -(-first // block_size)
    high = max(low, last // block_size)  # the blocks low..high are whole
    tiles: list[TileItem] = []
    items: list[Item] = []
    for tile in _whole_blocks(queries, low, high, group):
        if tile.masked or tile.rows.height * tile.keys.height < LARGE_TILE:
            tiles.append(tile)
        else:
            items.extend(part for item in tile.split() for part in split_item(item))
    for block in (low - 1, high):
        start, stop = block * block_size, min((block + 1) * block_size, last)
        for rows, keys, masked in triangle(stop - start, block_size) if max(start, first) < stop else ():
            top, bottom = max(rows.start + start, first), rows.stop + start
            if top < bottom:
                part = slice((top - first) * group, (bottom - first) * group)
                items.extend(split_item(Item(part, keys.start + start, keys.stop + start, masked)))
    return tiles, items


def triangle(edge: int, block_size: int) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, keys, masked): a causal square of `edge` tokens as diagonal tiles and rectangles under them."""
    tile = tile_edge(block_size)
    borders = [*range(0, edge, tile), edge]
    for start, stop in pairwise(borders):
        yield slice(start, stop), slice(start, stop), True
    yield from _below_diagonal(borders)


def _below_diagonal(borders: list[int]) -> Iterator[tuple[slice, slice, bool]]:
    """As few and as large rectangles as possible."""
    if len(borders) <= 2:
        return
    middle = len(borders) // 2
    yield slice(borders[middle], borders[-1]), slice(borders[0], borders[middle]), False
    yield from _below_diagonal(borders[: middle + 1])
    yield from _below_diagonal(borders[middle:])


def _whole_blocks(queries: PlannedQueries, low: int, high: int, group: int) -> Iterator[TileItem]:
    """The blocks low..high: pieces that are alike and evenly spaced, in batches whose logits fit into the cache."""
    alike: dict[tuple[int, int, int, bool], list[int]] = defaultdict(list)
    for part, keys, masked in triangle(queries.block_size, queries.block_size):
        alike[part.stop - part.start, keys.stop - keys.start, part.start - keys.start, masked].append(keys.start)
    for (height, width, below, masked), starts in alike.items():
        step = queries.block_size // len(starts)
        even = starts == list(range(starts[0], starts[0] + queries.block_size, step))
        for start, spacing in [(starts[0], step)] if even else [(start, queries.block_size) for start in starts]:
            total, most = (
                (high - low) * (queries.block_size // spacing),
                max(1, ITEM_ELEMENTS // (height * group * width)),
            )
            for first in range(0, total, most):
                number, key = min(most, total - first), low * queries.block_size + start + first * spacing
                rows = RowTiles((key + below - queries.position) * group, height * group, spacing * group, number)
                yield TileItem(rows, RowTiles(key, width, spacing, number), masked)


def partial_current_items(queries: PlannedQueries, own: Tensor) -> Iterator[Item]:
    """Current blocks where some queries have none, which happens when a rank holds a part of the keys only."""
    rows = own.flatten().nonzero()[:, 0]
    block = (rows // own.shape[1] + queries.position) // queries.block_size
    for number in block.unique().tolist():
        start = number * queries.block_size
        chosen = rows[block == number]
        yield from split_item(Item(chosen, start, min(start + queries.block_size, queries.num_keys), masked=True))


def selected_items(queries: PlannedQueries, block_indices_TGC: Tensor, first_block: int) -> Iterator[Item]:
    """For each block the rows that chose it, in ascending order."""
    tokens, group, columns = block_indices_TGC.shape
    if columns == 0:
        return
    blocks = -(-queries.num_keys // queries.block_size) if queries.key_spans is None else len(queries.key_spans)
    # 0 for "no block", else 1 + block of the document
    local = (block_indices_TGC - (first_block - 1)).clamp_(min=0).flatten()
    if blocks < torch.iinfo(torch.int16).max:
        local = local.to(torch.int16)  # a quarter of the sorting time
    order = local.sort(stable=True).indices
    counts = torch.bincount(local, minlength=blocks + 1).tolist()
    offset = counts[0]
    for block, count in enumerate(counts[1:]):
        if count:
            rows = order[offset : offset + count] // columns
            if count > ROW_STEP:
                rows = torch.nn.functional.pad(rows, (0, -count % ROW_STEP), value=tokens * group)
            yield from split_item(Item(rows, *_block_keys(queries, block)))
        offset += count


def _block_keys(queries: PlannedQueries, block: int) -> tuple[int, int]:
    """First and last key of a block of the document."""
    if queries.key_spans is not None:
        return queries.key_spans[block]
    start = block * queries.block_size
    return start, min(start + queries.block_size, queries.num_keys)


def split_item(item: Item) -> Iterator[Item]:
    """The same work in pieces whose logits fit into the cache."""
    keys = item.key_stop - item.key_start
    if keys == 0:
        return
    pieces = -(-keys // MAX_KEYS)
    width = -(-keys // pieces)
    first = item.rows.start if isinstance(item.rows, slice) else 0
    count = item.rows.stop - first if isinstance(item.rows, slice) else item.rows.numel()
    height = max(ROW_STEP, ITEM_ELEMENTS // width)
    height = -(-count // -(-count // height) // ROW_STEP) * ROW_STEP
    for low in range(0, count, height):
        stop = first + min(low + height, count)
        rows = slice(first + low, stop) if isinstance(item.rows, slice) else item.rows[low:stop]
        for start in range(item.key_start, item.key_stop, width):
            yield Item(rows, start, min(start + width, item.key_stop), item.masked)
