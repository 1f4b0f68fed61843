"""The plan of a corpus: which tokens stand in which row. Made once, part by part, kept in a cache, mapped from there.

Rows are packed shard by shard and never cross shards, so the plan of a run of shards, a part, can be made by anyone.
Row and token numbers run over the whole corpus. In the cache a plan is a folder with a file per part and, written
last, one that says how many rows every shard has; every file is whole or not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.job import Job
from neomoba_dist.data.pack import Packing, RowPlan, plan_rows
from neomoba_dist.data.stored import map_arrays, write_shared

VERSION = 3  # of the files; 2 had one file per array of the whole corpus, with the same rows
PART_DOCUMENTS = 1 << 20  # a part has at least as many, where its corpus has: 14 MB of plan, a second of work
MAPPED_PARTS = 32
ROWS_FILE = "rows"


@dataclass(frozen=True)
class Part:
    """The rows of some consecutive shards.

    shard_rows  int64 [shards]: rows of each
    totals      int64 [2]: tokens and documents in the rows
    rows        their pieces; piece_start counts over the corpus
    """

    shard_rows: np.ndarray
    totals: np.ndarray
    rows: RowPlan


class CorpusPlan:
    """The rows of a corpus.

    shard_ends  int64 [shards]: rows up to the end of each shard
    part_ends   int64 [parts]: rows up to the end of each part
    totals      int64 [2]: tokens and documents in the rows
    part        number of a part -> its RowPlan, whose rows count from its first
    """

    def __init__(
        self, shard_rows: np.ndarray, part_rows: np.ndarray, totals: np.ndarray, part: Callable[[int], RowPlan]
    ) -> None:
        self.shard_ends, self.part_ends = np.cumsum(shard_rows), np.cumsum(part_rows)
        self.totals, self.part = totals, part

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return int(self.part_ends[-1]) if len(self.part_ends) else 0

    def pieces(self, rows: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of some rows, int64 [n], row after row: as RowPlan.pieces."""
        part_of = np.searchsorted(self.part_ends, rows, side="right")
        found = []
        for part in np.unique(part_of).tolist():
            mine = np.flatnonzero(part_of == part)
            plan = self.part(part)
            row, *columns = plan.pieces(rows[mine] - (int(self.part_ends[part]) - plan.rows), packing)
            found.append((mine[row], *columns))
        if len(found) == 1:
            return found[0]
        merged = [np.concatenate(columns) for columns in zip(*found, strict=True)]
        order = np.argsort(merged[0], kind="stable")
        return tuple(column[order] for column in merged)  # type: ignore[return-value]


@dataclass(frozen=True)
class Planner:
    """How a corpus is packed: documents of at least `min_length` tokens, as `packing` says.

    fingerprint      names the corpus
    shard_documents, shard_tokens  int64 [shards]: what each shard holds
    lengths          (first, last) -> lengths in tokens of these documents, integers
    """

    fingerprint: str
    shard_documents: np.ndarray
    shard_tokens: np.ndarray
    lengths: Callable[[int, int], np.ndarray]
    packing: Packing
    min_length: int = 0

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        """[first, last) shards of each part."""
        found, first, documents = [], 0, 0
        for shard, count in enumerate(self.shard_documents.tolist()):
            documents += count
            if documents >= PART_DOCUMENTS or shard == len(self.shard_documents) - 1:
                found.append((first, shard + 1))
                first, documents = shard + 1, 0
        return found

    def folder(self, cache: Path) -> Path:
        """Where the plan lies in a cache."""
        facts = json.dumps([VERSION, self.fingerprint, self.min_length, dataclasses.asdict(self.packing)])
        return cache / "plans" / hashlib.sha256(facts.encode("ascii")).hexdigest()[:32]

    def file(self, folder: Path, part: int) -> Path:
        """The file of a part."""
        return folder / f"part-{part:05d}"

    def make(self, number: int) -> Part:
        """Packs a part. DataError where the lengths are not those of the shards."""
        first_shard, last_shard = self.parts[number]
        document = int(self.shard_documents[:first_shard].sum())
        token = int(self.shard_tokens[:first_shard].sum())
        shard_rows, totals, plans = [], np.zeros(2, np.int64), []
        for shard in range(first_shard, last_shard):
            lengths = self.lengths(document, document + int(self.shard_documents[shard])).astype(np.int64)
            starts = token + np.cumsum(lengths) - lengths
            document, token = document + len(lengths), token + int(self.shard_tokens[shard])
            if lengths.sum() != self.shard_tokens[shard]:
                raise DataError(
                    f"shard {shard} of the corpus has {self.shard_tokens[shard]} tokens, its documents "
                    f"{lengths.sum()}; run data_tools.verify_shards"
                )
            kept = (lengths >= self.min_length) & self.packing.takes(lengths)
            plans.append(plan_rows(starts[kept], lengths[kept], self.packing))
            shard_rows.append(plans[-1].rows)
            totals += (int(lengths[kept].sum()), int(kept.sum()))
        pieces = np.cumsum([0, *(len(plan.piece_start) for plan in plans)])
        rows = RowPlan(
            np.concatenate([[0], *(p.row_starts[1:] + n for p, n in zip(plans, pieces, strict=False))]),
            np.concatenate([plan.piece_start for plan in plans]),
            np.concatenate([plan.piece_length.astype(np.int32) for plan in plans]),
        )
        return Part(np.array(shard_rows, np.int64), totals, rows)

    def save(self, folder: Path, number: int) -> None:
        """Makes a part and writes its file, unless it is there."""
        if not self.file(folder, number).is_file():
            part = self.make(number)
            write_shared(self.file(folder, number), [part.shard_rows, part.totals, *vars(part.rows).values()])

    def missing(self, folder: Path) -> list[int]:
        """Numbers of the parts that are not in the folder; one look at the folder, whatever their number."""
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return [part for part in range(len(self.parts)) if self.file(folder, part).name not in present]

    def finish(self, folder: Path) -> None:
        """Writes down the rows of all shards, once every part is there, and sweeps up what killed processes left."""
        shard_rows, totals = [np.zeros(0, np.int64)], np.zeros(2, np.int64)
        for part in range(len(self.parts)):
            rows, counts = map_arrays(self.file(folder, part))[:2]
            shard_rows.append(rows.copy())
            totals += counts
        part_rows = np.array([rows.sum() for rows in shard_rows[1:]], np.int64)
        write_shared(folder / ROWS_FILE, [np.concatenate(shard_rows), part_rows, totals])
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def open(self, folder: Path) -> CorpusPlan:
        """The finished plan of a folder; its parts are mapped when they are used."""

        def part(number: int) -> RowPlan:
            path = self.file(folder, number)
            try:
                return RowPlan(*map_arrays(path)[2:])
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: damaged row plan ({error}); remove the folder {folder}") from error

        shard_rows, part_rows, totals = map_arrays(folder / ROWS_FILE)
        return CorpusPlan(shard_rows, part_rows, totals, lru_cache(MAPPED_PARTS)(part))


def corpus_plan(planner: Planner, cache: Path | None, job: Job) -> CorpusPlan:
    """The plan from `cache`/plans, made there first if need be by all ranks of the job; None makes it in memory.

    The ranks share the parts out, whether they see one cache or one per machine. AgreedError.
    """
    if cache is None:
        parts = [planner.make(part) for part in range(len(planner.parts))]
        return CorpusPlan(
            np.concatenate([np.zeros(0, np.int64), *(part.shard_rows for part in parts)]),
            np.array([part.rows.rows for part in parts], np.int64),
            np.sum([np.zeros(2, np.int64), *(part.totals for part in parts)], axis=0),
            lambda number: parts[number].rows,
        )
    folder = planner.folder(cache)
    if not all(job.gather((folder / ROWS_FILE).is_file())):
        _make_together(planner, folder, job)
    return planner.open(folder)


def _make_together(planner: Planner, folder: Path, job: Job) -> None:
    """Every rank makes its share; where a machine has a cache of its own, its ranks then make what they do not see."""
    job.agree(_save(planner, folder, range(job.rank, len(planner.parts), job.size)))
    host = socket.gethostname()
    told = job.gather((host, planner.missing(folder)))
    beside = [rank for rank, (name, _) in enumerate(told) if name == host]
    missing = sorted(set().union(*(told[rank][1] for rank in beside)))
    if any(parts for _, parts in told):
        job.agree(_save(planner, folder, missing[beside.index(job.rank) :: len(beside)]))
    # the first rank of each machine looks whether another one, with the same disk, was faster
    problem = None
    for turn in (job.rank == 0, job.rank == beside[0]):
        if turn and not (folder / ROWS_FILE).is_file():
            problem = _finish(planner, folder)
        job.agree(problem)


def _save(planner: Planner, folder: Path, parts: Sequence[int]) -> str | None:
    """Makes and writes parts; returns what went wrong."""
    try:
        for part in parts:
            planner.save(folder, part)
    except (DataError, OSError) as error:
        return f"{folder}: the row plan cannot be made ({error})"
    return None


def _finish(planner: Planner, folder: Path) -> str | None:
    try:
        planner.finish(folder)
    except (OSError, ValueError) as error:
        return f"{folder}: the row plan cannot be finished ({error}); remove the folder"
    return None
