"""Which queries meet which keys in one KV head of one document: the work list of MoBA's CPU path.

MoBA is a list of small unmasked attentions: the queries that chose a block, gathered, against the keys of that block.
The causal triangle of the own blocks is cut into a batch of small diagonal tiles and unmasked rectangles, because a
masked 512 x 512 block costs twice what its triangle needs.

Legend: a row is one (query token, query head of the group) pair, row = token * G + head, and one more row of zeros
stands at the end to pad lists; keys count from the start of the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor  # consecutive rows, or int64 row numbers

TILE = 128  # edge of the causal diagonal's tiles
ITEM_ELEMENTS = 1 << 18  # logits of one item: 1 MiB in float32, the second-level cache of one core
MAX_KEYS = 512
# Lists of rows are padded to a multiple of this: oneDNN compiles and keeps a kernel for every shape that it meets.
ROW_STEP = 64


class Item(NamedTuple):
    """Rows that attend to the keys key_start..key_stop, causally masked by position if `masked`."""

    rows: Rows
    key_start: int
    key_stop: int
    masked: bool = False


class HeadPlan(NamedTuple):
    """The diagonal as [tiles, tile, tile] (None: no diagonal) and everything else."""

    diagonal_start: int  # token of the first tile, also counted from this document's first planned query
    diagonal_tiles: int
    tile: int
    items: list[Item]


class Span(NamedTuple):
    """The planned queries of one document: tokens start..stop of `q`, the first at `position`; keys of the document."""

    start: int
    stop: int
    position: int
    num_keys: int
    block_size: int
    causal: bool
    key_spans: list[tuple[int, int]] | None = None  # first and last key of every block, where they are not counted


def plan_head(span: Span, routes_TGC: Tensor, first_block: int) -> HeadPlan:
    """The work list of one KV head: `routes_TGC` int [tokens, G, columns] holds global block numbers, -1 for none."""
    group = routes_TGC.shape[1]
    if not span.causal:
        return HeadPlan(0, 0, 1, list(routed_items(span, routes_TGC, first_block)))
    own = routes_TGC[:, :, 0] >= 0
    others = routed_items(span, routes_TGC[:, :, 1:], first_block)
    if not bool(own.all()) or span.position + span.stop - span.start > span.num_keys:
        return HeadPlan(0, 0, 1, [*partial_own_items(span, own), *others])
    tile = tile_edge(span.block_size)
    diagonal, items = own_items(span, tile, group)
    return HeadPlan(diagonal[0] - span.position, (diagonal[1] - diagonal[0]) // tile, tile, [*items, *others])


def tile_edge(block_size: int) -> int:
    """Edge of the diagonal's tiles: a divisor of the block where there is a good one, so that tiles can be batched."""
    divisors = (edge for edge in range(min(TILE, block_size), TILE // 4, -1) if block_size % edge == 0)
    return next(divisors, min(TILE, block_size))


def own_items(span: Span, tile: int, group: int) -> tuple[tuple[int, int], list[Item]]:
    """Own blocks, all causal: positions first..last of the batched diagonal, and the items that are left."""
    first, last = span.position, span.position + span.stop - span.start
    items: list[Item] = []
    batched = (first, first)
    if span.block_size % tile == 0:
        start = -(-first // tile) * tile
        batched = (start, max(start, last // tile * tile))
    for block in range(first // span.block_size * span.block_size, last, span.block_size):
        stop = min(block + span.block_size, last)
        borders = [*range(block, stop, tile), stop]
        for low, high in pairwise(borders):
            if high > first and not batched[0] <= max(low, first) < batched[1]:
                items.append(Item(_rows(span, max(low, first), high, group), low, high, masked=True))
        items.extend(_below_diagonal(span, borders, group))
    return batched, [part for item in items for part in split_item(item)]


def _below_diagonal(span: Span, borders: list[int], group: int) -> Iterator[Item]:
    """The unmasked part of one own block under its diagonal tiles, as few and as large rectangles as possible."""
    if len(borders) <= 2:
        return
    middle = len(borders) // 2
    start, stop = max(borders[middle], span.position), borders[-1]
    if stop > start:
        yield Item(_rows(span, start, stop, group), borders[0], borders[middle])
    yield from _below_diagonal(span, borders[: middle + 1], group)
    yield from _below_diagonal(span, borders[middle:], group)


def _rows(span: Span, start: int, stop: int, group: int) -> slice:
    """Rows of the queries at the positions start..stop."""
    return slice((start - span.position) * group, (stop - span.position) * group)


def partial_own_items(span: Span, own: Tensor) -> Iterator[Item]:
    """Own blocks where some queries have none, which happens when a rank holds a part of the keys only."""
    rows = own.flatten().nonzero()[:, 0]
    block = (rows // own.shape[1] + span.position) // span.block_size
    for number in block.unique().tolist():
        start = number * span.block_size
        chosen = rows[block == number]
        yield from split_item(Item(chosen, start, min(start + span.block_size, span.num_keys), masked=True))


def routed_items(span: Span, routes_TGC: Tensor, first_block: int) -> Iterator[Item]:
    """For each block the rows that chose it, in ascending order."""
    tokens, group, columns = routes_TGC.shape
    if columns == 0:
        return
    blocks = -(-span.num_keys // span.block_size) if span.key_spans is None else len(span.key_spans)
    local = (routes_TGC - (first_block - 1)).clamp_(min=0).flatten()  # 0 for "no block", else 1 + block of the document
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
            yield from split_item(Item(rows, *_block_keys(span, block)))
        offset += count


def _block_keys(span: Span, block: int) -> tuple[int, int]:
    """First and last key of a block of the document."""
    if span.key_spans is not None:
        return span.key_spans[block]
    start = block * span.block_size
    return start, min(start + span.block_size, span.num_keys)


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
