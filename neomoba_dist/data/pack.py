"""Packing: which pieces of which documents share a row.

"best_fit" is best-fit-decreasing (OLMo-core's OBFD): a document longer than a row is split into full rows and a rest;
the pieces, longest first, go each into the fullest row that still has room. Where more than 1/256 of a row stays free,
for want of short documents, the pieces of such rows are laid end to end and cut. Every token lands in exactly one row;
what is left free at a row's end is padding. "concat" lays all documents end to end and cuts them wherever a row is
full. With `align` every document starts at a multiple of it in its row, for example of the MoBA block, and padding
fills the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_GAP = 256  # a row is full enough when no more than this part of it is free


@dataclass(frozen=True)
class RowPlan:
    """Pieces by row: row r holds pieces [row_starts[r], row_starts[r + 1]), in corpus order.

    row_starts   int64 [rows + 1]
    piece_start  int64 [pieces]: first token of the piece
    piece_length int64 [pieces]: 1 .. length
    """

    row_starts: np.ndarray
    piece_start: np.ndarray
    piece_length: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1


def split_documents(start: np.ndarray, document_lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into pieces of at most `length` tokens.

    Returns (start, length) of the pieces, int64, in corpus order; only a document's last piece is shorter.
    """
    pieces = -(-document_lengths // length)
    first_piece = np.cumsum(pieces) - pieces
    within = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
    size = np.minimum(np.repeat(document_lengths, pieces) - within * length, length)
    return np.repeat(start, pieces) + within * length, size


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows: the method, tokens in a row, most pieces in a row, multiple at which pieces start."""

    length: int
    max_documents: int
    method: str = "best_fit"
    align: int = 1

    def slots(self, piece_length: np.ndarray) -> np.ndarray:
        """Tokens that pieces take up in a row, the gaps up to the next start included; int64 like `piece_length`."""
        return -(-piece_length // self.align) * self.align


def plan_rows(start: np.ndarray, document_lengths: np.ndarray, packing: Packing) -> RowPlan:
    """Packs documents into rows.

    `start`, `document_lengths` int64 [documents]: first token and length, each >= 1. Documents may be left out between
    those given, and are not read. The plan depends on nothing but the arguments.
    """
    if packing.method == "concat":
        return _concat(start, document_lengths, packing)
    start, size = split_documents(start, document_lengths, packing.length)
    slots = packing.slots(size)
    row_of_piece = _best_fit_decreasing(slots, packing.length, packing.max_documents)
    free = packing.length - np.bincount(row_of_piece, slots)
    loose = (free > packing.length // LARGEST_GAP)[row_of_piece]
    filled = _rows_of(np.unique(row_of_piece[~loose], return_inverse=True)[1], start[~loose], size[~loose])
    rest = _concat(start[loose], size[loose], packing)
    return RowPlan(
        np.concatenate([filled.row_starts, rest.row_starts[1:] + len(filled.piece_start)]),
        np.concatenate([filled.piece_start, rest.piece_start]),
        np.concatenate([filled.piece_length, rest.piece_length]),
    )


def _rows_of(row_of_piece: np.ndarray, start: np.ndarray, size: np.ndarray) -> RowPlan:
    """The plan in which each piece lies in its row, int64 [pieces]."""
    order = np.argsort(row_of_piece, kind="stable")
    counts = np.bincount(row_of_piece) if len(row_of_piece) else np.zeros(0, np.int64)
    row_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RowPlan(row_starts, start[order], size[order])


def _concat(start: np.ndarray, document_lengths: np.ndarray, packing: Packing) -> RowPlan:
    """Documents in their order, each begun in the row where the one before ended."""
    row_starts: list[int] = []
    piece_start: list[int] = []
    piece_length: list[int] = []
    room = pieces = 0
    for first, left in zip(start.tolist(), document_lengths.tolist(), strict=True):
        while left:
            if room <= 0 or pieces == packing.max_documents:
                row_starts.append(len(piece_start))
                room, pieces = packing.length, 0
            size = min(left, room)
            piece_start.append(first)
            piece_length.append(size)
            first, left, pieces = first + size, left - size, pieces + 1
            room -= -(-size // packing.align) * packing.align
    row_starts.append(len(piece_start))
    return RowPlan(*(np.array(column, np.int64) for column in (row_starts, piece_start, piece_length)))


def _best_fit_decreasing(sizes: np.ndarray, length: int, max_documents: int) -> np.ndarray:
    """Row of each piece: int64 [pieces].

    Open rows lie in stacks by their free room. `rooms` has bit r set while a row with room r is open, so the tightest
    row for a piece is the lowest set bit at or above its size: one shift of a big integer instead of a search tree.
    """
    row_of_piece = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    full = int(np.searchsorted(-sizes[order], -length, side="right"))
    row_of_piece[order[:full]] = np.arange(full)

    rows = full
    documents: dict[int, int] = {}
    open_rows: dict[int, list[int]] = {}
    rooms = 0
    for piece, size in zip(order[full:].tolist(), sizes[order[full:]].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            stack = open_rows[room]
            row = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            row, room = rows, length
            rows += 1
        row_of_piece[piece] = row
        documents[row] = count = documents.get(row, 0) + 1
        left = room - size
        if left and count < max_documents:
            stack = open_rows.setdefault(left, [])
            if not stack:
                rooms |= 1 << left
            stack.append(row)
        else:
            del documents[row]
    return row_of_piece
