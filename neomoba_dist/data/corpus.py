"""Corpus: a folder of shards, here or elsewhere, as its index describes it. `check.py` looks at the shards."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    LOSS_SPANS_FILE,
    MEMBERS_FILE,
    CorpusIndex,
    MemberTable,
)
from neomoba_dist.data.reader import TokenReader
from neomoba_dist.data.remote import RemoteFolder, is_remote
from neomoba_dist.data.stored import Columns, maps_at_once
from neomoba_dist.data.tokenizer import SpecialIds, Tokenizer, load_tokenizer


class Corpus:
    """A folder of token shards. Open it with `open_corpus`, or with `read_corpus` if it is checked later.

    name    the folder or url, for messages
    index   what index.json says
    key     the config key that names it, for messages
    remote  the folder, if it lies elsewhere
    reader  the tokens
    """

    def __init__(self, name: str, index: CorpusIndex, key: str, remote: RemoteFolder | None, maps: int) -> None:
        """At most `maps` shards are mapped at once."""
        self.name, self.index, self.key, self.remote = name, index, key, remote
        self.reader = TokenReader(index, self.members, self._open_shard, maps)
        if self.vocab_size - 1 > np.iinfo(index.dtype).max:
            raise DataError(
                f"{self.name}: ids are stored as {index.dtype}, too small for the tokenizer's {self.vocab_size} ids; "
                "tokenize the text again"
            )

    def open_file(self, name: str, sha256: str) -> Path:
        """The local path of a file of the corpus, fetched first if it lies elsewhere."""
        return self.remote.path(name, sha256) if self.remote else self.folder / name

    def _open_shard(self, number: int) -> Path:
        shard = self.index.shards[number]
        return self.open_file(shard.file, shard.sha256)

    def _columns(self, name: str, sha256: str) -> Columns:
        path = self.open_file(name, sha256)
        try:
            return Columns(path)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: missing; restore it or run data_tools.tokenize_corpus with --overwrite"
            ) from error
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); run data_tools.tokenize_corpus with --overwrite") from error

    @cached_property
    def _members(self) -> Columns:
        return self._columns(MEMBERS_FILE, self.index.members_sha256)

    @cached_property
    def _documents(self) -> Columns:
        return self._columns(DOCUMENTS_FILE, self.index.documents_sha256)

    @property
    def has_loss_spans(self) -> bool:
        """Whether the loss counts some tokens only: responses, not prompts."""
        return self.index.loss_spans_sha256 is not None

    @cached_property
    def _loss_spans(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.index.loss_spans_sha256 is not None
        columns = self._columns(LOSS_SPANS_FILE, self.index.loss_spans_sha256)
        return columns.mapped("starts"), columns.mapped("stops")

    @property
    def counted_tokens(self) -> int:
        """Tokens that the loss may count; of an encoder, which of these are masked is drawn in training."""
        if not self.has_loss_spans:
            return self.index.tokens
        begins, ends = self._loss_spans
        return int((ends - begins).sum())

    def mark_counted(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Sets True in `out`, bool, which tokens of some runs the loss counts: `lengths[i]` from number `starts[i]` on,
        which lie at `out[places[i]:]`. All int64 [runs]."""
        if not self.has_loss_spans:
            for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
                out[place : place + length] = True
            return
        begins, ends = self._loss_spans
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(begins, starts + lengths, side="left")
        run = np.repeat(np.arange(len(starts)), last - first)
        span = np.arange(len(run)) + (first - np.cumsum(last - first) + (last - first))[run]
        begin = np.maximum(begins[span], starts[run]) - starts[run] + places[run]
        end = np.minimum(ends[span], (starts + lengths)[run]) - starts[run] + places[run]
        for a, b in zip(begin.tolist(), end.tolist(), strict=True):
            out[a:b] = True

    def members(self, shard: int) -> MemberTable:
        """The members of a shard."""
        return MemberTable.of_shard(self._members, shard)

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Lengths of documents [first, last) in corpus order, tokens with document borders: int64."""
        return self._documents.read("lengths", first, last)

    @property
    def document_lengths(self) -> np.ndarray:
        """The same of all documents: a view of the mapped file."""
        return self._documents.mapped("lengths")

    @property
    def folder(self) -> Path:
        """The folder of a corpus on this machine."""
        return Path(self.name)

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
        entry = self.index.tokenizer
        path = self.open_file(entry.file, entry.sha256)
        tokenizer = load_tokenizer(path)
        if tokenizer.sha256 != entry.sha256:
            raise DataError(f"{path}: not the tokenizer of these shards")
        return tokenizer

    def tokens_at(self, start: int, count: int) -> np.ndarray:
        """Ids of `count` tokens from number `start` of the corpus on: int64 [count]. DataError if they are damaged."""
        ids = np.empty(count, self.reader.dtype)
        damaged = self.reader.read(np.array([start]), np.array([count]), ids, np.array([0]))
        for problem in damaged.values():
            raise DataError(problem)
        return ids.astype(np.int64)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuses a model whose vocabulary is too small: DataError names the key and a value that works."""
        if vocab_size < self.vocab_size:
            raise DataError(
                f"neomoba.model.vocab_size is {vocab_size}, but the tokenizer of {self.name} has "
                f"{self.vocab_size} ids: set neomoba.model.vocab_size={self.vocab_size}"
            )


def read_corpus(
    location: str | Path, key: str = "neomoba.data.train", cache: Path | None = None, *, corpora: int = 1
) -> Corpus:
    """The corpus that an index describes; nothing but the index is looked at.

    `location` is a folder, or a url as remote.py describes, whose files then come into the folder `cache`; `key` is the
    config key that names it, for messages; `corpora`: how many share this process's open files. DataError, in one line.
    """
    maps = maps_at_once(corpora)
    if is_remote(str(location)):
        if cache is None:
            raise DataError(f"{key}: {location} lies elsewhere and needs a cache; set neomoba.data.cache to a folder")
        remote = RemoteFolder(str(location), cache)
        try:
            payload = remote.read(INDEX_FILE)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        return Corpus(str(location), CorpusIndex.from_bytes(payload, remote.url(INDEX_FILE)), key, remote, maps)
    folder = Path(location)
    if not (folder / INDEX_FILE).is_file():
        raise DataError(
            f"{key}: no finished corpus in {folder} ({INDEX_FILE} is missing); make it with: python -m "
            f"data_tools.tokenize_corpus --input TEXT --tokenizer TOKENIZER --output {folder}"
        )
    return Corpus(str(folder), CorpusIndex.from_file(folder / INDEX_FILE), key, None, maps)
