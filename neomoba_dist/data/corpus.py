"""Corpus: an opened folder of shards, and RowReader: its tokens as packed rows."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import INDEX_FILE, MEMBERS_FILE, CorpusIndex, MemberTable
from neomoba_dist.data.pack import RowPlan, plan_rows
from neomoba_dist.data.shards import ShardReader, check_files
from neomoba_dist.data.tokenizer import SpecialIds, Tokenizer, load_tokenizer


class Corpus:
    """A checked folder of token shards. Open it with `open_corpus`."""

    def __init__(self, folder: Path, index: CorpusIndex, members: MemberTable, key: str) -> None:
        self.folder, self.index, self.key = folder, index, key
        borders = np.searchsorted(members.shard, np.arange(len(index.shards) + 1))
        self.shards = [
            ShardReader(folder, entry, index.dtype, members, int(borders[i]), int(borders[i + 1]))
            for i, entry in enumerate(index.shards)
        ]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer: every stored id is smaller."""
        return self.index.tokenizer.vocab_size

    @property
    def special(self) -> SpecialIds:
        """Id of each special token."""
        return SpecialIds(**self.index.tokenizer.special)

    @property
    def fingerprint(self) -> str:
        """Names the tokens and their order."""
        return self.index.fingerprint

    @property
    def tokens(self) -> int:
        """Stored tokens, document borders included."""
        return self.index.tokens

    @property
    def documents(self) -> int:
        """Stored documents."""
        return self.index.documents

    @property
    def unigram_entropy(self) -> float:
        """Nats per ordinary token: the loss of a model that knows only how frequent each token is."""
        return self.index.unigram_entropy

    @cached_property
    def ordinary(self) -> np.ndarray:
        """bool [vocab_size]: ids that text yields; False for special and unused ones."""
        ordinary = np.ones(self.vocab_size, dtype=bool)
        ordinary[self.index.tokenizer.reserved_ids()] = False
        return ordinary

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the shards; DataError if it is not the one that made them."""
        tokenizer = load_tokenizer(self.folder / self.index.tokenizer.file)
        if tokenizer.sha256 != self.index.tokenizer.sha256:
            raise DataError(f"{self.folder / self.index.tokenizer.file}: not the tokenizer of these shards")
        return tokenizer

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuses a model whose vocabulary is too small: DataError names the key and a value that works."""
        if vocab_size < self.vocab_size:
            raise DataError(
                f"neomoba.model.vocab_size is {vocab_size}, but the tokenizer of {self.folder} has "
                f"{self.vocab_size} ids: set neomoba.model.vocab_size={self.vocab_size}"
            )


def open_corpus(folder: str | Path, key: str = "neomoba.data.train") -> Corpus:
    """Opens a folder of shards and checks that every file is there and has its size.

    `key` is the config key that names the folder, for the message. DataError, in one line, if the index or a shard is
    missing, cut or extra. Payloads are checked when they are read, or all at once by `data_tools.verify_shards`.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        raise DataError(
            f"{key}: no finished corpus in {folder} ({INDEX_FILE} is missing); make it with: python -m "
            f"data_tools.tokenize_corpus --input TEXT --tokenizer TOKENIZER --output {folder}"
        )
    index = CorpusIndex.from_file(folder / INDEX_FILE)
    check_files(folder, index.shards)
    return Corpus(folder, index, MemberTable.from_file(folder / MEMBERS_FILE, index.members_sha256), key)


class RowReader:
    """The rows of a corpus for one row length. Row numbers run over the shards in order; no row crosses shards."""

    def __init__(self, corpus: Corpus, length: int, max_documents: int) -> None:
        self.corpus, self.length = corpus, length
        self._plans: list[RowPlan] = [
            plan_rows(shard.document_lengths(), length, max_documents) for shard in corpus.shards
        ]
        self._shard_ends = np.cumsum([plan.rows for plan in self._plans])
        self._padding_id = corpus.special.padding

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return int(self._shard_ends[-1]) if len(self._shard_ends) else 0

    @property
    def padding_share(self) -> float:
        """Share of the positions that hold padding."""
        return 1.0 - self.corpus.tokens / max(1, self.rows * self.length)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 [length], padded; lengths int64 [pieces] of its documents) of one row."""
        number = int(np.searchsorted(self._shard_ends, row, side="right"))
        plan, shard = self._plans[number], self.corpus.shards[number]
        local = row - int(self._shard_ends[number]) + plan.rows
        pieces = slice(plan.row_starts[local], plan.row_starts[local + 1])
        lengths = plan.piece_length[pieces]
        tokens_L = np.empty(self.length, dtype=np.int64)
        filled = 0
        for start, size in zip(plan.piece_start[pieces].tolist(), lengths.tolist(), strict=True):
            shard.read(start, tokens_L[filled : filled + size])
            filled += size
        tokens_L[filled:] = self._padding_id
        return tokens_L, lengths
