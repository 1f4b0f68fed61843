"""Rows of token ids, of one corpus or several mixed: read from the shards as the plan says, not yet masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import AgreedError
from neomoba_dist.data.job import Job
from neomoba_dist.data.mix import Schedule
from neomoba_dist.data.order import RowOrder
from neomoba_dist.data.pack import Packing
from neomoba_dist.data.plan import Planner, corpus_plan


@dataclass(frozen=True)
class RowBlock:
    """Some rows as they are stored, two bytes a token for most vocabularies.

    tokens_T     stored dtype [rows * length], laid end to end; `padding_id` where no piece lies
    row_ids      int64 [rows]
    piece_start  int64 [pieces]: where on the T axis each piece of a document starts, ascending
    piece_length int64 [pieces]
    damaged      row, counted in the block -> what is wrong with it, in one line
    counted_T    bool [rows * length]: tokens that the loss counts as targets; None: all
    """

    tokens_T: np.ndarray
    row_ids: np.ndarray
    piece_start: np.ndarray
    piece_length: np.ndarray
    padding_id: int
    damaged: dict[int, str]
    counted_T: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return len(self.tokens_T) // len(self.row_ids)

    def rows(self, first: int, last: int) -> RowBlock:
        """The block of rows [first, last) alone; shares the memory of the tokens."""
        start, stop = first * self.length, last * self.length
        pieces = slice(*np.searchsorted(self.piece_start, (start, stop)).tolist())
        return RowBlock(
            self.tokens_T[start:stop],
            self.row_ids[first:last],
            self.piece_start[pieces] - start,
            self.piece_length[pieces],
            self.padding_id,
            {row - first: text for row, text in self.damaged.items() if first <= row < last},
            None if self.counted_T is None else self.counted_T[start:stop],
        )

    def without(self, rows: np.ndarray) -> RowBlock:
        """The block with the rows where bool [rows] is True turned into padding, which counts nothing."""
        tokens_T = self.tokens_T.copy()
        tokens_T.reshape(len(rows), -1)[rows] = self.padding_id
        kept = ~rows[self.piece_start // self.length]
        return replace(
            self, tokens_T=tokens_T, piece_start=self.piece_start[kept], piece_length=self.piece_length[kept]
        )


@dataclass(frozen=True)
class Source:
    """A corpus, its share of the rows, and the least length in tokens of the documents that are taken from it."""

    corpus: Corpus
    weight: Fraction = Fraction(1)
    min_length: int = 0


def make_planner(source: Source, packing: Packing) -> Planner:
    """How the rows of a source are planned."""
    corpus = source.corpus
    shards = corpus.index.shards
    documents = np.array([shard.documents for shard in shards], np.int64)
    tokens = np.array([shard.tokens for shard in shards], np.int64)
    return Planner(corpus.fingerprint, documents, tokens, corpus.lengths, packing, source.min_length)


class RowReader:
    """The rows of one source. Row numbers run over the shards in order; no row crosses shards."""

    def __init__(self, source: Source, packing: Packing, cache: Path | None = None, job: Job | None = None) -> None:
        """The ranks of the job make the plan together, if the cache does not have it. AgreedError where no document is
        long enough."""
        corpus = self.corpus = source.corpus
        self.packing = packing
        self.plan = corpus_plan(make_planner(source, packing), cache, job or Job())
        if self.plan.rows == 0:
            longest = f" and at most {packing.length} (neomoba.phase.sequence_length)" * packing.keeps_whole
            raise AgreedError(
                f"{corpus.key}: {corpus.name} has no document of {source.min_length} tokens or more{longest}"
            )

    def read(
        self, rows: np.ndarray, slots: np.ndarray, out_T: np.ndarray, counted_T: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Copies `rows` (int64 [n]) to rows `slots` (int64 [n]) of `out_T`, and sets there in `counted_T`, bool, which
        tokens the loss counts.

        Returns piece_start, piece_length (int64 [pieces], in the order of `rows`) and damaged, as RowBlock has them.
        """
        row_of_piece, place, start, length = self.plan.pieces(rows, self.packing)
        place += slots[row_of_piece] * self.packing.length
        problems = self.corpus.reader.read(start, length, out_T, place)
        if counted_T is not None:
            self.corpus.mark_counted(start, length, counted_T, place)
        return place, length, {int(slots[row_of_piece[piece]]): text for piece, text in problems.items()}


class Rows:
    """The rows of all sources. A row's id, epoch * rows of all sources + row, names the row and its masks.

    AgreedError, in one line, if the sources do not share a tokenizer, or one of them has no row.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        packing: Packing,
        seed: int,
        *,
        shuffle_shards: int | None = None,
        cache: Path | None = None,
        job: Job | None = None,
    ) -> None:
        """All ranks of the job make the plans together and call this together."""
        self.sources, self.packing = list(sources), packing
        first = self.sources[0].corpus
        for source in self.sources:
            if source.corpus.index.tokenizer.sha256 != first.index.tokenizer.sha256:
                raise AgreedError(
                    f"{first.key}: {source.corpus.name} and {first.name} were made with different tokenizers; "
                    "tokenize them with the same one"
                )
        self.readers = [RowReader(source, packing, cache, job) for source in self.sources]
        self._orders = [RowOrder(reader.plan.shard_ends, seed, shuffle_shards) for reader in self.readers]
        self._ends = np.cumsum([reader.plan.rows for reader in self.readers])
        self._schedule = Schedule([source.weight for source in self.sources])
        self._dtype = np.result_type(*(source.corpus.reader.dtype for source in self.sources))
        self._has_loss_spans = any(source.corpus.has_loss_spans for source in self.sources)
        self.padding_id = first.special.padding

    @property
    def total(self) -> int:
        """Rows of all sources together."""
        return int(self._ends[-1])

    @property
    def shares(self) -> list[Fraction]:
        """Each source's share of the rows of a run."""
        whole = sum(source.weight for source in self.sources)
        return [source.weight / whole for source in self.sources]

    @property
    def padding_share(self) -> float:
        """Share of the positions of a run that hold padding."""
        used = [reader.plan.totals[0] / (reader.plan.rows * self.packing.length) for reader in self.readers]
        return 1.0 - float(sum(float(share) * part for share, part in zip(self.shares, used, strict=True)))

    def row_ids(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` int64 [n] of the run: int64 [n]."""
        source_of, places = self._schedule.sources_at(positions)
        ids = np.empty_like(positions)
        for source in np.unique(source_of).tolist():
            order, mine = self._orders[source], source_of == source
            epochs = places[mine] // order.rows
            ids[mine] = epochs * self.total + int(self._ends[source]) - order.rows + order.rows_at(places[mine])
        return ids

    def read(self, ids: np.ndarray) -> RowBlock:
        """The rows of these ids, int64 [n]."""
        numbers = ids % self.total
        source_of = np.searchsorted(self._ends, numbers, side="right")
        tokens_T = np.full(len(ids) * self.packing.length, self.padding_id, self._dtype)
        counted_T = np.zeros(len(tokens_T), bool) if self._has_loss_spans else None
        starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        damaged: dict[int, str] = {}
        for source in np.unique(source_of).tolist():
            slots = np.flatnonzero(source_of == source)
            rows = numbers[slots] - (int(self._ends[source]) - self._orders[source].rows)
            start, length, problems = self.readers[source].read(rows, slots, tokens_T, counted_T)
            starts.append(start)
            lengths.append(length)
            damaged |= problems
        piece_start, piece_length = np.concatenate(starts), np.concatenate(lengths)
        if len(starts) > 1:
            order = np.argsort(piece_start)
            piece_start, piece_length = piece_start[order], piece_length[order]
        return RowBlock(tokens_T, ids, piece_start, piece_length, self.padding_id, damaged, counted_T)
