"""From rows to the Batch that the model receives: labels, positions, document borders, tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import IGNORE_LABEL, PADDING_POSITION, Batch
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.masking import MaskedLanguageModel, TokenDropout, next_token_labels, padding_runs
from neomoba_dist.data.rows import RowBlock
from neomoba_dist.data.words import word_table
from neomoba_dist.parallel.documents import check_cu_seqlens


def max_documents(settings: DataConfig, rows: int) -> int:
    """Most documents that so many rows are made of, padding included: what the borders of a Batch have room for."""
    # at a row's end, and with align behind every document, padding makes one more
    return rows * (settings.max_documents_per_row * (2 if settings.align > 1 else 1) + 1)


class Builder(ABC):
    """Turns rows into a Batch with labels of its objective.

    `corpus` gives the vocabulary, `length` is that of a row. With `pin_memory` the tensors lie where a GPU can fetch
    them by itself.
    """

    def __init__(
        self, corpus: Corpus, settings: DataConfig, *, objective: str, length: int, seed: int, pin_memory: bool = False
    ) -> None:
        self._settings, self._pin_memory, self._ramp = settings, pin_memory, np.arange(length)

    @abstractmethod
    def build(self, block: RowBlock) -> Batch:
        """The Batch of these rows, T = rows * length; `num_valid` is its own count."""

    def build_update(self, block: RowBlock, micro_batch_size: int) -> list[Batch]:
        """The rows as micro-batches; `num_valid` and `num_pairs` of each are the counts over all of them."""
        starts = range(0, len(block.row_ids), micro_batch_size)
        batches = [self.build(block.rows(first, first + micro_batch_size)) for first in starts]
        num_valid, num_pairs = (sum(getattr(batch, name) for batch in batches) for name in ("num_valid", "num_pairs"))
        return [replace(batch, num_valid=num_valid, num_pairs=num_pairs) for batch in batches]

    def _empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._pin_memory)

    def _borders(self, borders: np.ndarray | Sequence[int], rows: int, total: int) -> torch.Tensor:
        """`Batch.cu_seqlens` of these borders, of its fixed length."""
        cu_seqlens = self._empty(max_documents(self._settings, rows) + 1, torch.int32)
        cu_seqlens[: len(borders)] = torch.as_tensor(borders)
        cu_seqlens[len(borders) :] = total
        check_cu_seqlens(cu_seqlens, total)
        return cu_seqlens


class BatchBuilder(Builder):
    """Rows as they are, with labels of one objective, "mlm" or "clm".

    DataError before the first row: unknown scheme, no token to hide others behind.
    """

    def __init__(
        self, corpus: Corpus, settings: DataConfig, *, objective: str, length: int, seed: int, pin_memory: bool = False
    ) -> None:
        super().__init__(corpus, settings, objective=objective, length=length, seed=seed, pin_memory=pin_memory)
        self._masks: MaskedLanguageModel | None = None
        self._dropout: TokenDropout | None = None
        special = corpus.special
        if objective == "mlm":
            if special.mask is None:
                raise DataError(
                    f"{corpus.name}: its tokenizer has no mask token, so neomoba.model.objective=mlm cannot be "
                    "trained on it; set neomoba.model.objective=clm or tokenize with another tokenizer"
                )
            words = word_table(corpus.tokenizer()) if settings.mlm_whole_word else None
            self._masks = MaskedLanguageModel(
                seed, settings.mlm_probability, settings.mlm_scheme, special.mask, corpus.ordinary, words
            )
        if settings.token_dropout:
            hidden = special.mask if special.mask is not None else special.unk
            if hidden is None:
                raise DataError(
                    f"{corpus.name}: its tokenizer has neither a mask nor an unknown token for "
                    "neomoba.data.token_dropout to put in place of tokens; set token_dropout to 0"
                )
            self._dropout = TokenDropout(seed, settings.token_dropout, hidden, corpus.ordinary)

    def build(self, block: RowBlock) -> Batch:
        rows, total = len(block.row_ids), len(block.tokens_T)
        input_ids, labels, position_ids = (self._empty(total, torch.int64) for _ in range(3))
        input_ids_T, labels_T, position_ids_T = (t.numpy() for t in (input_ids, labels, position_ids))
        input_ids_T[:] = block.tokens_T
        if self._masks:
            labels_T.fill(IGNORE_LABEL)
            num_valid = self._masks.apply(block, input_ids_T, labels_T)
        else:
            num_valid = next_token_labels(block, labels_T)
        if self._dropout:
            self._dropout.apply(block, input_ids_T, labels_T >= 0 if self._masks else np.zeros(total, bool))

        for start, length in zip(block.piece_start.tolist(), block.piece_length.tolist(), strict=True):
            position_ids_T[start : start + length] = self._ramp[:length]
        for start, stop in padding_runs(block):
            position_ids_T[start:stop] = PADDING_POSITION
        row_starts = np.arange(rows) * block.length
        borders = np.unique(np.concatenate([row_starts, block.piece_start, block.piece_start + block.piece_length]))
        return Batch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            cu_seqlens=self._borders(borders, rows, total),
            row_ids=torch.from_numpy(block.row_ids),
            num_valid=num_valid,
        )
