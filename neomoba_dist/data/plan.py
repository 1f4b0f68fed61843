"""The plan of a corpus: which tokens stand in which row. Worked out once, kept in a cache, mapped from there.

Rows are packed shard by shard and never cross shards. Row and token numbers run over the whole corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from neomoba_dist.data.pack import Packing, plan_rows

VERSION = 2  # of the packing: another version packs other rows


@dataclass(frozen=True)
class CorpusPlan:
    """Row r holds pieces [row_starts[r], row_starts[r + 1]).

    row_starts   int64 [rows + 1]
    piece_start  int64 [pieces]: first token of the piece, counted over the corpus
    piece_length int32 [pieces]: 1 .. length
    shard_ends   int64 [shards]: rows up to the end of each shard
    totals       int64 [2]: tokens and documents in the rows
    """

    row_starts: np.ndarray
    piece_start: np.ndarray
    piece_length: np.ndarray
    shard_ends: np.ndarray
    totals: np.ndarray

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
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


def make_plan(lengths: np.ndarray, shard_documents: list[int], packing: Packing, min_length: int) -> CorpusPlan:
    """Packs the documents of at least `min_length` tokens.

    `lengths` int64 [documents]: of all documents in corpus order; `shard_documents`: how many lie in each shard.
    """
    starts = np.cumsum(lengths) - lengths
    borders = np.cumsum([0, *shard_documents]).tolist()
    plans = []
    for first, last in pairwise(borders):
        kept = first + np.flatnonzero(lengths[first:last] >= min_length)
        plans.append(plan_rows(starts[kept], lengths[kept], packing))
    pieces = np.cumsum([0, *(len(plan.piece_start) for plan in plans)])
    kept_lengths = lengths[lengths >= min_length]
    return CorpusPlan(
        row_starts=np.concatenate([[0], *(p.row_starts[1:] + n for p, n in zip(plans, pieces, strict=False))]),
        piece_start=np.concatenate([np.zeros(0, np.int64), *(plan.piece_start for plan in plans)]),
        piece_length=np.concatenate([np.zeros(0, np.int32), *(p.piece_length.astype(np.int32) for p in plans)]),
        shard_ends=np.cumsum([plan.rows for plan in plans], dtype=np.int64),
        totals=np.array([kept_lengths.sum(), len(kept_lengths)], np.int64),
    )


def cached_plan(
    fingerprint: str,
    lengths: np.ndarray,
    shard_documents: list[int],
    packing: Packing,
    min_length: int,
    cache: Path | None,
) -> CorpusPlan:
    """The plan from `cache`/plans, made and put there first if need be; `cache` None makes it in memory.

    Ranks that start together may make it at the same time; the first that is done names the folder. A folder has its
    name only when it is whole.
    """
    if cache is None:
        return make_plan(lengths, shard_documents, packing, min_length)
    facts = json.dumps([VERSION, fingerprint, min_length, dataclasses.asdict(packing)])
    folder = cache / "plans" / hashlib.sha256(facts.encode("ascii")).hexdigest()[:32]
    if not folder.is_dir():
        _save(make_plan(lengths, shard_documents, packing, min_length), folder)
    return CorpusPlan(*(_mapped(path) for path in _files(folder)))


def _files(folder: Path) -> Iterator[Path]:
    return (folder / f"{field.name}.npy" for field in dataclasses.fields(CorpusPlan))


def _mapped(path: Path) -> np.ndarray:
    """A plain view of the mapped file: pages are read when rows are, and shared by the ranks of a machine."""
    return np.asarray(np.load(path, mmap_mode="r"))


def _save(plan: CorpusPlan, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for path, array in zip(_files(temporary), vars(plan).values(), strict=True):
        with open(path, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    try:
        temporary.rename(folder)
    except OSError:  # another rank was first
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
