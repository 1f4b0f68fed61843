"""Corpus: an opened folder of shards, here or elsewhere, with all that its index says checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    MEMBERS_FILE,
    CorpusIndex,
    DocumentTable,
    MemberTable,
)
from neomoba_dist.data.reader import TokenReader
from neomoba_dist.data.remote import RemoteFolder, is_remote
from neomoba_dist.data.shards import check_files
from neomoba_dist.data.tokenizer import SpecialIds, Tokenizer, load_tokenizer

OpenFile = Callable[[str, str], Path]


class Corpus:
    """A checked folder of token shards. Open it with `open_corpus`.

    name              the folder or url, for messages
    index             what index.json says
    document_lengths  int64 [documents], tokens with document borders, in corpus order
    reader            the tokens
    """

    def __init__(self, name: str, index: CorpusIndex, open_file: OpenFile, key: str) -> None:
        """`open_file` gives the local path of a file from its name and its sha256; `key` is named in messages."""
        self.name, self.index, self.key = name, index, key
        self._open_file = open_file
        members = MemberTable.from_file(open_file(MEMBERS_FILE, index.members_sha256), index.members_sha256)
        documents = DocumentTable.from_file(open_file(DOCUMENTS_FILE, index.documents_sha256), index.documents_sha256)
        self.document_lengths = documents.lengths
        self.reader = TokenReader(index, members, self._open_shard)
        self._check_counts(members)

    def _check_counts(self, members: MemberTable) -> None:
        """The tables must agree with the index. DataError."""
        index = self.index
        stored = int(members.tokens_size.sum()) // np.dtype(index.dtype).itemsize
        lengths = self.document_lengths
        if (len(lengths), int(lengths.sum()), stored) != (index.documents, index.tokens, index.tokens):
            raise DataError(
                f"{self.name}: {INDEX_FILE} counts {index.documents} documents and {index.tokens} tokens, its tables "
                f"{len(lengths)} and {int(lengths.sum())}, in members of {stored}; the corpus is damaged"
            )
        if self.vocab_size - 1 > np.iinfo(index.dtype).max:
            raise DataError(
                f"{self.name}: ids are stored as {index.dtype}, too small for the tokenizer's {self.vocab_size} ids; "
                "tokenize the text again"
            )

    def _open_shard(self, number: int) -> Path:
        shard = self.index.shards[number]
        return self._open_file(shard.file, shard.sha256)

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
        path = self._open_file(entry.file, entry.sha256)
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


def open_corpus(place: str | Path, key: str = "neomoba.data.train", cache: Path | None = None) -> Corpus:
    """Opens a corpus and checks that every shard is there, has its size and is the one that the index means.

    `place` is a folder, or a url as remote.py describes, whose files then come into the folder `cache`; `key` is the
    config key that names it, for messages. DataError, in one line, if the index or a shard is missing, cut, swapped or
    extra. Payloads are checked when they are read, or all at once by `data_tools.verify_shards`.
    """
    if is_remote(str(place)):
        return _open_remote(str(place), key, cache)
    folder = Path(place)
    if not (folder / INDEX_FILE).is_file():
        raise DataError(
            f"{key}: no finished corpus in {folder} ({INDEX_FILE} is missing); make it with: python -m "
            f"data_tools.tokenize_corpus --input TEXT --tokenizer TOKENIZER --output {folder}"
        )
    index = CorpusIndex.from_file(folder / INDEX_FILE)
    check_files(folder, index.shards)
    corpus = Corpus(str(folder), index, lambda name, sha256: folder / name, key)
    corpus.reader.check_first_members()
    return corpus


def _open_remote(place: str, key: str, cache: Path | None) -> Corpus:
    if cache is None:
        raise DataError(f"{key}: {place} lies elsewhere and needs a cache; set neomoba.data.cache to a folder")
    remote = RemoteFolder(place, cache)
    try:
        payload = remote.read(INDEX_FILE)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    index = CorpusIndex.from_bytes(payload, remote.url(INDEX_FILE))
    for problem in remote.problems(index.shards):
        raise DataError(problem)
    return Corpus(place, index, remote.path, key)
