"""The stream of updates: (data, seed, length, mixture, k) -> the rows of update k, and nothing else decides.

Position p of the run is a row that the mixture and the epoch's order name; update k takes positions [k * R,
(k + 1) * R) with R = rows per update. An update may cross from one epoch into the next, so no row is dropped or
repeated and every update is full. Data-parallel ranks and accumulation steps divide an update and never change it. The
state counts rows, not updates: it stays valid for another number of ranks or another update size.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.builders import builder_of
from neomoba_dist.data.errors import AgreedError, DataError
from neomoba_dist.data.job import Job
from neomoba_dist.data.pack import Packing
from neomoba_dist.data.prefetch import prefetch
from neomoba_dist.data.rows import RowBlock, Rows, Source

Agree = Callable[[np.ndarray], np.ndarray]

# state key -> config key; `rows` alone may differ
_FIXED = {
    "seed": "neomoba.phase.seed",
    "sequence_length": "neomoba.phase.sequence_length",
    "max_documents_per_row": "neomoba.data.max_documents_per_row",
    "packing": "neomoba.data.packing",
    "align": "neomoba.data.align",
    "shuffle_shards": "neomoba.data.shuffle_shards",
}


class StreamState(TypedDict):
    """All that a resume needs; the same on every rank. `rows`: rows consumed by the whole run."""

    fingerprint: str
    seed: int
    sequence_length: int
    max_documents_per_row: int
    packing: str
    align: int
    shuffle_shards: int | None
    rows: int


def make_packing(settings: DataConfig, length: int) -> Packing:
    """How the configuration packs rows of `length` tokens."""
    return Packing(
        length=length, max_documents=settings.max_documents_per_row, method=settings.packing, align=settings.align
    )


class UpdateStream:
    """Iterates over updates without end: yields (micro-batches of this data-parallel rank, state after them).

    `num_valid` and `num_pairs` of each Batch are this rank's counts over all its micro-batches of the update; with more
    than one data-parallel rank the trainer sums them over all and sets them with `dataclasses.replace`. `skipped_rows`
    counts the rows of the last update, over all ranks, that were damaged and turned into padding (`on_corrupt` "skip").
    DataError before the first row: see `Rows`, the builder, and fewer rows than one update takes; DataError at a
    row that is damaged (`on_corrupt` "raise").
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: DataConfig,
        *,
        objective: str,
        sequence_length: int,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        pairs: bool = False,
        pin_memory: bool = False,
        agree: Agree | None = None,
        job: Job | None = None,
    ) -> None:
        """`agree` turns what this rank found damaged, bool [rows of the update], into what any rank found; the ranks
        of `job`, which call this together, make the row plans together. pairs: for next-sentence prediction."""
        self.settings, self.seed, self.rows_consumed = settings, seed, 0
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.skipped_rows = 0
        self._agree = agree
        self.rows = Rows(
            sources,
            make_packing(settings, sequence_length),
            seed,
            shuffle_shards=settings.shuffle_shards,
            cache=None if settings.cache is None else Path(settings.cache),
            job=job,
        )
        self._builder = builder_of(objective, pairs)(
            sources[0].corpus, settings, objective=objective, length=sequence_length, seed=seed, pin_memory=pin_memory
        )
        self.rows_per_update = micro_batch_size * accumulation * dp_size
        self._require_rows()

    @property
    def rows_in_epoch(self) -> int:
        """Rows of all sources."""
        return self.rows.total

    @property
    def padding_share(self) -> float:
        """Share of the positions of a run that hold padding."""
        return self.rows.padding_share

    def __iter__(self) -> Generator[tuple[list[Batch], StreamState], None, None]:
        """Rows are read `settings.prefetch` updates ahead, in a thread; masks are drawn when an update is taken."""
        with prefetch(self._read_updates(self.rows_consumed), self.settings.prefetch) as blocks:
            for block in blocks:
                block = self._without_damage(block)
                self.rows_consumed += self.rows_per_update
                yield self._builder.build_update(block, self.micro_batch_size), self.state_dict()

    def state_dict(self) -> StreamState:
        """The position after the last update that was yielded."""
        return StreamState(
            fingerprint=self._fingerprint(),
            seed=self.seed,
            sequence_length=self.rows.packing.length,
            max_documents_per_row=self.rows.packing.max_documents,
            packing=self.rows.packing.method,
            align=self.rows.packing.align,
            shuffle_shards=self.settings.shuffle_shards,
            rows=self.rows_consumed,
        )

    def row_ids(self, state: StreamState) -> list[int]:
        """Ids of the rows of a whole update, over all ranks, by the state after it."""
        return self.rows.row_ids(np.arange(state["rows"] - self.rows_per_update, state["rows"])).tolist()

    def load_state_dict(self, state: StreamState, *, allow_data_change: bool = False) -> None:
        """Goes on where `state` was taken, on any number of ranks; call it before iterating.

        DataError if it is of other data or other rows, unless `allow_data_change`: then the count of rows goes on, and
        what they hold is what the new data give.
        """
        own = self.state_dict()
        if not allow_data_change:
            if state["fingerprint"] != own["fingerprint"]:
                names = ", ".join(source.corpus.name for source in self.rows.sources)
                raise DataError(
                    f"{self.rows.sources[0].corpus.key}: {names} is not the data of the checkpoint (fingerprint "
                    f"{own['fingerprint']}, checkpoint {state['fingerprint']}); point the key at that data, or go on "
                    "with other rows by --allow-data-change"
                )
            for key, name in _FIXED.items():
                if state.get(key) != own.get(key):
                    raise DataError(
                        f"{name} is {own.get(key)}, the checkpoint's rows were drawn with {state.get(key)}: keep it "
                        "to resume, start a new phase with --init_from, or go on with other rows by --allow-data-change"
                    )
        self.rows_consumed = state["rows"]

    def _fingerprint(self) -> str:
        """Names the data: the corpus's own fingerprint, or one over all sources with weights and least lengths."""
        sources = self.rows.sources
        if len(sources) == 1 and not sources[0].min_length:
            return sources[0].corpus.fingerprint
        facts = [f"{s.corpus.fingerprint} {w} {s.min_length}" for s, w in zip(sources, self.rows.shares, strict=True)]
        return hashlib.sha256("\n".join(facts).encode("ascii")).hexdigest()[:32]

    def _require_rows(self) -> None:
        for source, reader, share in zip(self.rows.sources, self.rows.readers, self.rows.shares, strict=True):
            needed = float(share) * self.rows_per_update
            if reader.plan.rows < needed:
                raise AgreedError(
                    f"{source.corpus.key}: {source.corpus.name} gives {reader.plan.rows} rows of "
                    f"{self.rows.packing.length} tokens, fewer than the {needed:g} of one update: add text or lower "
                    "neomoba.phase.tokens_per_update"
                )

    def _read_updates(self, position: int) -> Iterator[RowBlock]:
        """Rows of this rank: micro-batch a of rank r has [(a * dp + r) * micro, ... + micro) of an update."""
        shape = (self.accumulation, self.dp_size, self.micro_batch_size)
        while True:
            positions = np.arange(position, position + self.rows_per_update).reshape(shape)[:, self.dp_rank]
            yield self.rows.read(self.rows.row_ids(positions.reshape(-1)))
            position += self.rows_per_update

    def _without_damage(self, block: RowBlock) -> RowBlock:
        """The block without rows that this rank, or another one with the same rows, found damaged."""
        if self.settings.on_corrupt == "raise":
            for problem in block.damaged.values():
                raise DataError(problem)
            return block
        for problem in block.damaged.values():
            logging.getLogger(__name__).warning("row skipped: %s", problem)
        found = np.zeros((self.accumulation, self.dp_size, self.micro_batch_size), bool)
        own = np.zeros(len(block.row_ids), bool)
        own[list(block.damaged)] = True
        found[:, self.dp_rank] = own.reshape(self.accumulation, -1)
        if self._agree:
            found = self._agree(found.reshape(-1)).reshape(found.shape)
        self.skipped_rows = int(found.sum())
        return block.without(found[:, self.dp_rank].reshape(-1)) if self.skipped_rows else block
