"""Packing: which pieces of which documents share a row.

"best_fit" is best-fit-decreasing (OLMo-core's OBFD): a document longer than a row is split into full rows and a rest;
the pieces, longest first, go each into the fullest row that still has room. Where more than 1/256 of a row stays free,
for want of short documents, the pieces of such rows are laid end to end and cut. Every token lands in exactly one row;
what is left free at a row's end is padding. "concat" lays all documents end to end and cuts them wherever a row is
full. "whole" is best fit without cuts: a document stays in one piece, and one longer than a row is left out. With
`align` every document starts at a multiple of it in its row, for example of the MoBA block, and padding fills the gaps.
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
    piece_length integers [pieces]: 1 .. length
    """

    row_starts: np.ndarray
    piece_start: np.ndarray
    piece_length: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1

    def pieces(self, rows: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of some rows, int64 [n], row after row. Each int64 [pieces].

        Returns (which of `rows`, place in the row, first token, length).
        """
        counts = self.row_starts[rows + 1] - self.row_starts[rows]
        row_of_piece = np.repeat(np.arange(len(rows)), counts)
        earlier = np.cumsum(counts) - counts
        piece = np.arange(len(row_of_piece)) + (self.row_starts[rows] - earlier)[row_of_piece]
        length = self.piece_length[piece].astype(np.int64)
        room = packing.slots(length)
        before = np.cumsum(room) - room
        return row_of_piece, before - before[earlier][row_of_piece], self.piece_start[piece], length


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows: the method, tokens in a row, most pieces in a row, multiple at which pieces start."""

    length: int
    max_documents: int
    method: str = "best_fit"
    align: int = 1

    @property
    def keeps_whole(self) -> bool:
        """Whether documents longer than a row are left out, and all others stay in one piece."""
        return self.method == "whole"

    def takes(self, document_lengths: np.ndarray) -> np.ndarray:
        """Which documents of these lengths get into a row: bool [documents]."""
        return document_lengths <= self.length if self.keeps_whole else np.ones(len(document_lengths), bool)

    def slots(self, piece_length: np.ndarray) -> np.ndarray:
        """Tokens that pieces take up in a row, the gaps up to the next start included; int64 like `piece_length`."""
        return -(-piece_length // self.align) * self.align


def plan_rows(start: np.ndarray, document_lengths: np.ndarray, packing: Packing) -> RowPlan:
    """Packs documents into rows.

    `start`, `document_lengths` int64 [documents]: first token and length, each >= 1. Documents may be left out between
    those given, and are not read. The plan depends on nothing but the arguments.
    """
    from neomoba_dist.data import pack_loops

    starts, lengths = start.astype(np.int64, copy=False), document_lengths.astype(np.int64, copy=False)
    options = (packing.length, packing.align, packing.max_documents)
    if packing.method == "concat":
        return RowPlan(*pack_loops.concatenated(starts, lengths, *options))
    largest_gap = packing.length if packing.keeps_whole else packing.length // LARGEST_GAP
    return RowPlan(*pack_loops.best_fit(starts, lengths, *options, largest_gap))
