"""The loops of packing, compiled by numba: under a tenth of a microsecond per document. `pack.py` says what they do.

Imported only where rows are planned: numba takes half a second and 60 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

_BITS, _LEVELS = 64, 4  # a tree of 64-bit words, four deep: rows of up to 16M tokens
# place of the only set bit of a word, by the top six bits of its product with this number (de Bruijn sequence)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACE = np.zeros(_BITS, np.int64)
for _bit in range(_BITS):
    _PLACE[(int(_DE_BRUIJN) << _bit & (1 << _BITS) - 1) >> 58] = _bit


def _compiled(function: F) -> F:
    """Compiled code is kept beside the source or in the home folder; where neither can be written, made each time."""
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[return-value]
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[return-value]


@_compiled
def _lowest(word: np.uint64) -> int:
    """Place of the lowest set bit of a word that is not 0."""
    only = word & (~word + np.uint64(1))
    return _PLACE[(only * _DE_BRUIJN) >> np.uint64(58)]


@_compiled
def _insert(words: np.ndarray, levels: np.ndarray, number: int) -> None:
    for level in range(_LEVELS):
        at = levels[level] + number // _BITS
        before = words[at]
        words[at] = before | (np.uint64(1) << np.uint64(number % _BITS))
        if before:
            return
        number //= _BITS


@_compiled
def _remove(words: np.ndarray, levels: np.ndarray, number: int) -> None:
    for level in range(_LEVELS):
        at = levels[level] + number // _BITS
        words[at] &= ~(np.uint64(1) << np.uint64(number % _BITS))
        if words[at]:
            return
        number //= _BITS


@_compiled
def _at_least(words: np.ndarray, levels: np.ndarray, number: int) -> int:
    """The smallest number in the set that is not below `number`; -1 if there is none."""
    for level in range(_LEVELS):
        at = number // _BITS
        if levels[level] + at >= levels[level + 1]:
            return -1
        rest = words[levels[level] + at] >> np.uint64(number % _BITS)
        if rest:
            number += _lowest(rest)
            for below in range(level - 1, -1, -1):
                number = number * _BITS + _lowest(words[levels[below] + number])
            return number
        number = at + 1
    return -1


@_compiled
def concatenated(starts: np.ndarray, lengths: np.ndarray, length: int, align: int, max_documents: int) -> Arrays:
    """Documents in their order, each begun in the row where the one before ended: a RowPlan's arrays, all int64."""
    row_starts, piece_start, piece_length = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    for fill in range(2):  # the first time only counts
        room = in_row = rows = pieces = 0
        for document in range(len(starts)):
            first, left = starts[document], lengths[document]
            while left > 0:
                if room <= 0 or in_row == max_documents:
                    if fill:
                        row_starts[rows] = pieces
                    rows += 1
                    room, in_row = length, 0
                size = min(left, room)
                if fill:
                    piece_start[pieces], piece_length[pieces] = first, size
                pieces += 1
                in_row += 1
                first += size
                left -= size
                room -= -(-size // align) * align
        if not fill:
            row_starts, piece_start, piece_length = (
                np.empty(rows + 1, np.int64),
                np.empty(pieces, np.int64),
                np.empty(pieces, np.int64),
            )
    row_starts[rows] = pieces
    return row_starts, piece_start, piece_length


@_compiled
def _split(starts: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of pieces of at most `length` tokens; only a document's last piece is shorter."""
    pieces = 0
    for size in lengths:
        pieces += -(-size // length)
    start, sizes = np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    at = 0
    for document in range(len(starts)):
        first, left = starts[document], lengths[document]
        while left > 0:
            start[at], sizes[at] = first, min(left, length)
            first += length
            left -= length
            at += 1
    return start, sizes


@_compiled
def _rows_of_pieces(slots: np.ndarray, length: int, max_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, longest first: (row of each piece int32 [pieces], free tokens of each row int32 [rows]).

    Open rows lie in stacks by their free room, linked lists through `below`; `words` is the set of the rooms that have
    one, so the tightest row for a piece is the smallest member at or above its size.
    """
    pieces = len(slots)
    # longest first, equals in corpus order: counting sort
    place = np.zeros(length + 2, np.int64)
    for size in slots:
        place[length - size + 1] += 1
    place = np.cumsum(place)
    order = np.empty(pieces, np.int32)
    for piece in range(pieces):
        at = length - slots[piece]
        order[place[at]] = piece
        place[at] += 1

    levels = np.zeros(_LEVELS + 1, np.int64)
    span = length + 1
    for level in range(_LEVELS):
        span = -(-span // _BITS)
        levels[level + 1] = levels[level] + span
    words = np.zeros(levels[_LEVELS], np.uint64)
    top = np.full(length + 1, -1, np.int32)
    below = np.empty(pieces, np.int32)
    documents = np.zeros(pieces, np.int32)
    free = np.empty(pieces, np.int32)
    row_of_piece = np.empty(pieces, np.int32)
    rows = 0
    for piece in order:  # type: ignore[assignment]
        size = slots[piece]
        room = -1 if size == length else _at_least(words, levels, size)
        if room < 0:
            row, room = rows, length
            rows += 1
        else:
            row = top[room]
            top[room] = below[row]
            if top[room] < 0:
                _remove(words, levels, room)
        row_of_piece[piece] = row
        documents[row] += 1
        left = room - size
        free[row] = left
        if left > 0 and documents[row] < max_documents:
            if top[left] < 0:
                _insert(words, levels, left)
            below[row] = top[left]
            top[left] = row
    return row_of_piece, free[:rows]


@_compiled
def best_fit(
    starts: np.ndarray, lengths: np.ndarray, length: int, align: int, max_documents: int, largest_gap: int
) -> Arrays:
    """Best-fit-decreasing; rows with more than `largest_gap` free tokens are laid end to end: a RowPlan's arrays."""
    start, size = _split(starts, lengths, length)
    row_of_piece, free = _rows_of_pieces(np.minimum(-(-size // align) * align, length), length, max_documents)
    # the full rows in their order, renumbered; their pieces and the loose ones in corpus order
    number = np.full(len(free), -1, np.int32)
    counts = np.zeros(len(free) + 1, np.int64)
    rows = 0
    for row in range(len(free)):
        if free[row] <= largest_gap:
            number[row] = rows
            rows += 1
    filled = 0
    for row in row_of_piece:
        if number[row] >= 0:
            counts[number[row] + 1] += 1
            filled += 1
    place = np.cumsum(counts)
    row_starts = place[: rows + 1].copy()
    piece_start, piece_length = np.empty(filled, np.int64), np.empty(filled, np.int64)
    loose_start, loose_length = np.empty(len(start) - filled, np.int64), np.empty(len(start) - filled, np.int64)
    loose = 0
    for piece in range(len(start)):
        row = number[row_of_piece[piece]]
        if row >= 0:
            piece_start[place[row]], piece_length[place[row]] = start[piece], size[piece]
            place[row] += 1
        else:
            loose_start[loose], loose_length[loose] = start[piece], size[piece]
            loose += 1
    rest_rows, rest_start, rest_length = concatenated(loose_start, loose_length, length, align, max_documents)
    return (
        np.concatenate((row_starts, rest_rows[1:] + filled)),
        np.concatenate((piece_start, rest_start)),
        np.concatenate((piece_length, rest_length)),
    )
