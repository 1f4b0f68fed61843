"""The stream of updates: (corpus, seed, length, k) -> the rows of update k, and nothing else decides.

Rows are drawn in a fresh order each epoch; position p of the run is row order(epoch = p // rows)[p % rows], and update
k takes positions [k * R, (k + 1) * R) with R = rows per update. An update may cross from one epoch into the next, so
no row is dropped or repeated. Data-parallel ranks and accumulation steps divide an update and never change it. The
state counts rows, not updates: it stays valid for another number of ranks or another update size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch

from neomoba_dist.data.batch import IGNORE_LABEL, PADDING_POSITION, Batch
from neomoba_dist.data.corpus import Corpus, RowReader
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.masking import MaskedLanguageModel, next_token_labels

VALIDATION_SEED = 0


class StreamState(TypedDict):
    """All that a resume needs; the same on every rank. `rows`: rows consumed by the whole run."""

    fingerprint: str
    seed: int
    sequence_length: int
    max_documents_per_row: int
    rows: int


class RowOrder:
    """The order of `rows` rows in each epoch: a permutation that depends on (seed, epoch) only.

    The permutation sorts raw Philox words keyed by (seed, epoch), which no version of numpy changes.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def row_id(self, position: int) -> int:
        """Global row id (epoch * rows + row) at a position of the run."""
        epoch, within = divmod(position, self.rows)
        if epoch != self._epoch:
            # the counter's last word keeps these words apart from the masks', whose key is (seed, row id)
            counter = np.array([0, 0, 0, 1], np.uint64)
            key = np.array([self.seed, epoch], np.uint64)
            words = np.random.Philox(counter=counter, key=key).random_raw(self.rows)
            self._order, self._epoch = np.argsort(words, kind="stable"), epoch
        return epoch * self.rows + int(self._order[within])


class BatchBuilder:
    """Turns rows of a corpus into a Batch with labels of one objective ("mlm" or "clm")."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        objective: str,
        sequence_length: int,
        seed: int,
        mlm_probability: float,
        mlm_scheme: str,
        max_documents_per_row: int,
    ) -> None:
        self.reader = RowReader(corpus, sequence_length, max_documents_per_row)
        # one more than the documents: the padding at a row's end
        self.borders_per_row = max_documents_per_row + 1
        self._masks: MaskedLanguageModel | None = None
        if objective == "mlm":
            mask_id = corpus.special.mask
            if mask_id is None:
                raise DataError(
                    f"{corpus.folder}: its tokenizer has no mask token, so neomoba.model.objective=mlm cannot be "
                    "trained on it; set neomoba.model.objective=clm or tokenize with another tokenizer"
                )
            self._masks = MaskedLanguageModel(seed, mlm_probability, mlm_scheme, mask_id, corpus.ordinary)
        elif objective != "clm":
            raise DataError(f"objective {objective!r}: choose mlm or clm")

    def build(self, row_ids: list[int]) -> Batch:
        """The Batch of these rows, T = len(row_ids) * length; `num_valid` is its own count."""
        length, rows = self.reader.length, len(row_ids)
        input_ids = np.empty((rows, length), dtype=np.int64)
        labels = np.empty((rows, length), dtype=np.int64)
        position_ids = np.empty((rows, length), dtype=np.int64)
        cu_seqlens = np.full(rows * self.borders_per_row + 1, rows * length, dtype=np.int32)
        border = 0
        for i, row_id in enumerate(row_ids):
            tokens_L, pieces = self.reader.read(row_id % self.reader.rows)
            if self._masks is None:
                input_ids[i], labels[i] = tokens_L, next_token_labels(tokens_L, pieces)
            else:
                input_ids[i], labels[i] = self._masks.apply(tokens_L, row_id)
            padding = length - int(pieces.sum())
            spans = np.append(pieces, padding) if padding else pieces
            starts = np.cumsum(spans) - spans
            position_ids[i] = np.arange(length) - np.repeat(starts, spans)
            position_ids[i, length - padding :] = PADDING_POSITION
            cu_seqlens[border : border + len(spans)] = i * length + starts
            border += len(spans)
        return Batch(
            input_ids=torch.from_numpy(input_ids.reshape(-1)),
            labels=torch.from_numpy(labels.reshape(-1)),
            position_ids=torch.from_numpy(position_ids.reshape(-1)),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            row_ids=torch.tensor(row_ids, dtype=torch.int64),
            num_valid=int((labels != IGNORE_LABEL).sum()),
        )


class UpdateStream:
    """Iterates over updates without end: yields (micro-batches of this data-parallel rank, state after them).

    `num_valid` of each Batch is this rank's count over all its micro-batches of the update; with more than one
    data-parallel rank the trainer sums it over them and sets it with `dataclasses.replace`.
    DataError before the first row: unknown objective or scheme, no mask token for MLM, fewer rows than one update.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        objective: str,
        sequence_length: int,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        mlm_probability: float = 0.2,
        mlm_scheme: str = "80/10/10",
        max_documents_per_row: int = 128,
        start_row: int = 0,
    ) -> None:
        self.corpus, self.seed, self.rows_consumed = corpus, seed, start_row
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.max_documents_per_row = max_documents_per_row
        self._builder = BatchBuilder(
            corpus,
            objective=objective,
            sequence_length=sequence_length,
            seed=seed,
            mlm_probability=mlm_probability,
            mlm_scheme=mlm_scheme,
            max_documents_per_row=max_documents_per_row,
        )
        self.rows_per_update = micro_batch_size * accumulation * dp_size
        if self.rows_in_epoch < self.rows_per_update:
            raise DataError(
                f"{corpus.key}: {corpus.folder} gives {self.rows_in_epoch} rows of {sequence_length} tokens, fewer "
                f"than the {self.rows_per_update} of one update: add text or lower neomoba.phase.tokens_per_update"
            )
        self._order = RowOrder(self.rows_in_epoch, seed)

    @property
    def rows_in_epoch(self) -> int:
        """Rows of the packed corpus."""
        return self._builder.reader.rows

    @property
    def padding_share(self) -> float:
        """Share of the positions of an epoch that hold padding."""
        return self._builder.reader.padding_share

    def __iter__(self) -> Iterator[tuple[list[Batch], StreamState]]:
        while True:
            update = self._next_update()
            self.rows_consumed += self.rows_per_update
            yield update, self.state_dict()

    def state_dict(self) -> StreamState:
        """The position after the last update that was yielded."""
        return StreamState(
            fingerprint=self.corpus.fingerprint,
            seed=self.seed,
            sequence_length=self._builder.reader.length,
            max_documents_per_row=self.max_documents_per_row,
            rows=self.rows_consumed,
        )

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state` was taken, on any number of ranks. DataError if it is of other data or other rows."""
        own = self.state_dict()
        if state["fingerprint"] != own["fingerprint"]:
            raise DataError(
                f"{self.corpus.key}: {self.corpus.folder} is not the corpus of the checkpoint (fingerprint "
                f"{own['fingerprint']}, checkpoint {state['fingerprint']}); point the key at that corpus"
            )
        for key, name in (
            ("seed", "neomoba.phase.seed"),
            ("sequence_length", "neomoba.phase.sequence_length"),
            ("max_documents_per_row", "neomoba.data.max_documents_per_row"),
        ):
            if state[key] != own[key]:  # type: ignore[literal-required]
                raise DataError(
                    f"{name} is {own[key]}, the checkpoint's rows were drawn with {state[key]}: "  # type: ignore[literal-required]
                    "keep it to resume, or start a new phase with --init_from"
                )
        self.rows_consumed = state["rows"]

    def _next_update(self) -> list[Batch]:
        """This rank's micro-batches: micro-batch a of rank r holds rows [(a * dp + r) * micro, ... + micro)."""
        batches = []
        for a in range(self.accumulation):
            first = self.rows_consumed + (a * self.dp_size + self.dp_rank) * self.micro_batch_size
            row_ids = [self._order.row_id(p) for p in range(first, first + self.micro_batch_size)]
            batches.append(self._builder.build(row_ids))
        num_valid = sum(batch.num_valid for batch in batches)
        return [replace(batch, num_valid=num_valid) for batch in batches]


def validation_batches(
    corpus: Corpus,
    *,
    objective: str,
    sequence_length: int,
    micro_batch_size: int,
    rows: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    mlm_probability: float = 0.2,
    mlm_scheme: str = "80/10/10",
    max_documents_per_row: int = 128,
) -> list[Batch]:
    """The fixed rows and masks on which every validation runs: this rank's share, the same number on each rank.

    The first `rows` rows (all, if the corpus has fewer) of epoch 0 under a seed of their own, whatever the run's seed
    and layout. Where they do not fill all micro-batches, a repeated row without labels fills up: it counts nothing.
    """
    builder = BatchBuilder(
        corpus,
        objective=objective,
        sequence_length=sequence_length,
        seed=VALIDATION_SEED,
        mlm_probability=mlm_probability,
        mlm_scheme=mlm_scheme,
        max_documents_per_row=max_documents_per_row,
    )
    order = RowOrder(builder.reader.rows, VALIDATION_SEED)
    rows = min(rows, builder.reader.rows)
    if rows == 0:
        raise DataError(f"{corpus.key}: {corpus.folder} holds no row to validate on")
    batches = []
    step = micro_batch_size * dp_size
    for first in range(dp_rank * micro_batch_size, -(-rows // step) * step, step):
        positions = range(first, first + micro_batch_size)
        batch = builder.build([order.row_id(p if p < rows else 0) for p in positions])
        filler = torch.tensor([p >= rows for p in positions]).repeat_interleave(sequence_length)
        labels = batch.labels.masked_fill(filler, IGNORE_LABEL)
        batches.append(replace(batch, labels=labels, num_valid=int((labels != IGNORE_LABEL).sum())))
    return batches
