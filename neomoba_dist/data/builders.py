"""The table of builders, by objective, and the builders for an encoder-decoder and for next-sentence prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.config.span_corruption import corrupted_lengths
from neomoba_dist.data.batch import IGNORE_LABEL, PADDING_POSITION, Batch, EncoderTokens
from neomoba_dist.data.build import BatchBuilder, Builder
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import RowBlock
from neomoba_dist.data.sentence_pairs import SentencePairs, count_pairs
from neomoba_dist.data.span_corruption import SpanCorruption, find_sentinels


class SpanCorruptionBuilder(Builder):
    """Rows with corrupted documents: the encoder's and the decoder's tokens, in rows of fixed lengths of their own.

    Documents follow one another in both, padding is the last one of each row, and an empty one where there is none. The
    decoder reads its targets one place later, after the padding token (T5, arXiv 1910.10683, section 2.1).
    AgreedError before the first row: too few sentinels in the tokenizer.
    """

    def __init__(
        self, corpus: Corpus, settings: DataConfig, *, objective: str, length: int, seed: int, pin_memory: bool = False
    ) -> None:
        super().__init__(corpus, settings, objective=objective, length=length, seed=seed, pin_memory=pin_memory)
        self.lengths = corrupted_lengths(length, settings.max_documents_per_row)
        sentinels = find_sentinels(corpus.tokenizer(), self.lengths.sentinels, length, corpus.name)
        self._corruption = SpanCorruption(seed, sentinels, corpus.ordinary)

    def build(self, block: RowBlock) -> Batch:
        rows = self._corruption.corrupt(block)
        sources = [[text.source for text in row] for row in rows]
        targets = [[text.target for text in row] for row in rows]
        labels = self._packed(targets, self.lengths.decoder, IGNORE_LABEL)
        read = [[_shifted(target, block.padding_id) for target in row] for row in targets]
        return Batch(
            input_ids=self._packed(read, self.lengths.decoder, block.padding_id),
            labels=labels,
            position_ids=self._positions(targets, self.lengths.decoder),
            cu_seqlens=self._cu_seqlens(targets, self.lengths.decoder),
            row_ids=torch.from_numpy(block.row_ids),
            num_valid=int((labels != IGNORE_LABEL).sum()),
            encoder=EncoderTokens(
                input_ids=self._packed(sources, self.lengths.encoder, block.padding_id),
                position_ids=self._positions(sources, self.lengths.encoder),
                cu_seqlens=self._cu_seqlens(sources, self.lengths.encoder),
            ),
        )

    def _packed(self, rows: Sequence[Sequence[np.ndarray]], length: int, fill: int) -> torch.Tensor:
        """The documents of each row end to end, then `fill`: int64 [rows * length]."""
        packed = self._empty(len(rows) * length, torch.int64)
        for out, documents in zip(packed.numpy().reshape(len(rows), length), rows, strict=True):
            ids = np.concatenate(documents) if documents else np.zeros(0, np.int64)
            out[: len(ids)], out[len(ids) :] = ids, fill
        return packed

    def _positions(self, rows: Sequence[Sequence[np.ndarray]], length: int) -> torch.Tensor:
        """Positions in the documents, as `Batch.position_ids`."""
        return self._packed([[self._ramp[: len(ids)] for ids in row] for row in rows], length, PADDING_POSITION)

    def _cu_seqlens(self, rows: Sequence[Sequence[np.ndarray]], length: int) -> torch.Tensor:
        """Borders of all documents and of every row's padding, empty or not."""
        borders = [0]
        for number, row in enumerate(rows):
            borders += (number * length + np.cumsum([len(ids) for ids in row], dtype=np.int64)).tolist()
            borders.append((number + 1) * length)
        return self._borders(borders, len(rows), len(rows) * length)


def _shifted(target: np.ndarray, start: int) -> np.ndarray:
    """One token later, after `start`."""
    return np.concatenate(([start], target[:-1])) if len(target) else target


class SentencePairBuilder(BatchBuilder):
    """Rows whose documents become pairs, with masks as in any row, token types, and labels of next-sentence prediction.

    DataError before the first row: as `BatchBuilder`, and no [CLS] or [SEP].
    """

    def __init__(self, corpus: Corpus, settings: DataConfig, *, seed: int, **others: Any) -> None:
        super().__init__(corpus, settings, seed=seed, **others)
        self._pairs = SentencePairs(seed, corpus.special, corpus.name)

    def build(self, block: RowBlock) -> Batch:
        types, labels = (self._empty(len(block.tokens_T), torch.int64).fill_(fill) for fill in (0, IGNORE_LABEL))
        batch = super().build(self._pairs.apply(block, types.numpy(), labels.numpy()))
        return replace(batch, token_type_ids=types, next_sentence_labels=labels, num_pairs=count_pairs(labels.numpy()))


BUILDERS: Final[Mapping[str, type[Builder]]] = {
    "mlm": BatchBuilder,
    "clm": BatchBuilder,
    "span_corruption": SpanCorruptionBuilder,
}


def builder_of(objective: str, pairs: bool = False) -> type[Builder]:
    """The builder of an objective. pairs: with next-sentence prediction, which goes with "mlm". Raises DataError."""
    if pairs:
        return SentencePairBuilder
    if objective not in BUILDERS:
        raise DataError(f"objective {objective!r}: choose one of {', '.join(BUILDERS)}")
    return BUILDERS[objective]
