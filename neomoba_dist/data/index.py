"""What a folder of shards says about itself: `index.json`, `members.npz` (byte offsets), `documents.npz` (lengths).

A corpus folder holds `shard-00000.tar ...`, the tokenizer's file, the tables and, written last, `index.json`:
no index means not finished. The index pins every other file by sha256, so one fingerprint names the whole corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neomoba_dist.config.paths import is_file_name
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.stored import Columns

INDEX_FILE = "index.json"
MEMBERS_FILE = "members.npz"
DOCUMENTS_FILE = "documents.npz"
LOSS_SPANS_FILE = "loss_spans.npz"
FORMAT = "neomoba-shards"
VERSION = 2
# least lengths, in tokens, of the subsets that every corpus lists: phases train on long documents by choosing one
SUBSET_LENGTHS = (1024, 2048, 8192, 32_768)
# share of unknown tokens, or of the text that they stand for, above which a corpus is worth a warning
MUCH_UNKNOWN = 0.01
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file: its size in bytes, its digest, and what it holds."""

    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer of the ids. `special`: role -> id; `reserved_ranges`: [start, stop) of ids that no text yields."""

    file: str
    kind: str
    sha256: str
    vocab_size: int
    special: dict[str, int | None]
    reserved_ranges: list[list[int]]

    def reserved_ids(self) -> list[int]:
        """The reserved ids, sorted."""
        return [i for start, stop in self.reserved_ranges for i in range(start, stop)]


@dataclass(frozen=True, kw_only=True)
class MemberTable:
    """One entry per member pair, in corpus order: where its bytes lie in its shard, and their crc32.

    `shard` int32 [M] counts from 0; offsets and sizes int64 [M], in bytes; crc32 uint32 [M]. In foreign shards, indexed
    by `data_tools.index`, a member is one document and has no lengths: their size, offset and crc32 are 0.
    """

    shard: np.ndarray
    tokens_offset: np.ndarray
    tokens_size: np.ndarray
    tokens_crc32: np.ndarray
    lengths_offset: np.ndarray
    lengths_size: np.ndarray
    lengths_crc32: np.ndarray

    @classmethod
    def from_columns(cls, columns: dict[str, list[int]]) -> MemberTable:
        """The table of these columns, each with its type."""
        types = {"shard": np.int32} | {name: np.uint32 for name in columns if name.endswith("crc32")}
        return cls(**{name: np.array(column, types.get(name, np.int64)) for name, column in columns.items()})

    def to_bytes(self) -> bytes:
        """As an .npz file; the same table gives the same bytes."""
        return _npz(vars(self))

    @classmethod
    def from_file(cls, path: Path, sha256: str) -> MemberTable:
        """Reads the whole table; DataError if the file is missing or is not the one with `sha256`."""
        return cls(**_checked_npz(path, sha256))

    @classmethod
    def of_shard(cls, columns: Columns, shard: int) -> MemberTable:
        """The members of one shard, read from the file of the table."""
        numbers = range(columns.length("shard"))
        first, last = (
            bisect_left(numbers, s, key=lambda i: columns.read("shard", i, i + 1)[0]) for s in (shard, shard + 1)
        )
        return cls(**{field.name: columns.read(field.name, first, last) for field in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class DocumentTable:
    """Length of every document, and which documents are long.

    lengths  int64 [documents], tokens with document borders, in corpus order; the shards' counts say where each lies
    subsets  least length -> ascending numbers of the documents of at least that length, int64 [documents in it]
    """

    lengths: np.ndarray
    subsets: dict[int, np.ndarray]

    @classmethod
    def from_lengths(cls, lengths: np.ndarray) -> DocumentTable:
        """The table of documents of these lengths."""
        return cls(lengths=lengths, subsets={least: np.flatnonzero(lengths >= least) for least in SUBSET_LENGTHS})

    def to_bytes(self) -> bytes:
        """As an .npz file; the same table gives the same bytes."""
        lists = {f"at_least_{least}": documents for least, documents in self.subsets.items()}
        return _npz({"lengths": self.lengths} | lists)

    @classmethod
    def from_file(cls, path: Path, sha256: str) -> DocumentTable:
        """Reads the whole table; DataError if the file is missing or is not the one with `sha256`."""
        arrays = _checked_npz(path, sha256)
        return cls(
            lengths=arrays.pop("lengths"),
            subsets={int(name.removeprefix("at_least_")): documents for name, documents in arrays.items()},
        )


@dataclass(frozen=True, kw_only=True)
class LossSpans:
    """Which tokens the loss counts, where it does not count all: those numbered [starts[i], stops[i]).

    Both int64 [spans], ascending; tokens are numbered over the whole corpus.
    """

    starts: np.ndarray
    stops: np.ndarray

    def to_bytes(self) -> bytes:
        """As an .npz file; the same table gives the same bytes."""
        return _npz(vars(self))

    @classmethod
    def from_file(cls, path: Path, sha256: str) -> LossSpans:
        """Reads the whole table; DataError if the file is missing or is not the one with `sha256`."""
        return cls(**_checked_npz(path, sha256))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def table_problem(path: Path, sha256: str) -> str | None:
    """What is wrong with the file of a table, None if it is the one with `sha256`."""
    if not path.is_file():
        return f"{path}: missing; restore it or run data_tools.tokenize_corpus with --overwrite"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return f"{path}: not the file that {INDEX_FILE} names (sha256 differs); the corpus is damaged"
    return None


def _checked_npz(path: Path, sha256: str) -> dict[str, np.ndarray]:
    if problem := table_problem(path, sha256):
        raise DataError(problem)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@dataclass(frozen=True, kw_only=True)
class CorpusIndex:
    """The content of `index.json`.

    dtype           type of the stored little-endian ids: "uint16" or "uint32", in foreign shards also "int32", "int64"
    documents, tokens  totals over the shards; tokens include document borders
    unigram_entropy nats per token over the ordinary tokens: the loss of a model that knows only their frequencies
    length_histogram pairs [length, documents up to this length and above the one before]; lengths in tokens
    subsets         triples [least length, documents at least as long, their tokens]; lists in `documents.npz`
    members_sha256, documents_sha256  digests of `members.npz` and `documents.npz`
    recipe          digest of what the corpus was made from and how: the same recipe gives the same bytes
    unknown_tokens  tokens that stand for text which the vocabulary cannot write; None: not counted, an old index
    unknown_share   their share of the ordinary tokens
    unknown_text_share  share of the characters that they stand for, in all text that was read; None: ids made elsewhere
    loss_spans_sha256   digest of `loss_spans.npz`; None: the loss counts every token
    """

    dtype: str
    documents: int
    tokens: int
    unigram_entropy: float
    length_histogram: list[list[int]]
    subsets: list[list[int]]
    tokenizer: TokenizerEntry
    members_sha256: str
    documents_sha256: str
    recipe: str
    shards: list[ShardEntry]
    unknown_tokens: int | None = None
    unknown_share: float | None = None
    unknown_text_share: float | None = None
    loss_spans_sha256: str | None = None

    @property
    def tables(self) -> list[tuple[str, str]]:
        """(file, digest) of every table."""
        spans = [] if self.loss_spans_sha256 is None else [(LOSS_SPANS_FILE, self.loss_spans_sha256)]
        return [(MEMBERS_FILE, self.members_sha256), (DOCUMENTS_FILE, self.documents_sha256), *spans]

    @property
    def unknown(self) -> str:
        """What of the text is unknown to the tokenizer, in words."""
        if self.unknown_tokens is None or self.unknown_share is None:
            return "unknown tokens not counted"
        text = "" if self.unknown_text_share is None else f", for {self.unknown_text_share:.2%} of the text"
        return f"{self.unknown_tokens} unknown tokens ({self.unknown_share:.2%}{text})"

    @property
    def largest_unknown_share(self) -> float:
        """The larger of the two shares: one unknown token can stand for a megabyte without a space."""
        return max(self.unknown_share or 0.0, self.unknown_text_share or 0.0)

    @property
    def fingerprint(self) -> str:
        """Names the tokens, their order and what counts: 32 hex digits over the digests of tokenizer, members, shards,
        loss spans."""
        shards = (shard.sha256 for shard in self.shards)
        spans = [] if self.loss_spans_sha256 is None else [self.loss_spans_sha256]
        parts = [FORMAT, str(VERSION), self.dtype, self.tokenizer.sha256, self.members_sha256, *shards, *spans]
        return hashlib.sha256("\n".join(parts).encode("ascii")).hexdigest()[:32]

    def to_json(self) -> str:
        """The text of `index.json`."""
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        return json.dumps(head | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> CorpusIndex:
        """Reads and checks `index.json`; DataError names what is wrong with it."""
        return cls.from_bytes(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, payload: bytes, path: str) -> CorpusIndex:
        """The same from the content of the file; `path` is named in errors."""
        try:
            raw: dict[str, Any] = json.loads(payload.decode("utf-8"))
            if (found := raw.pop("format")) != FORMAT:
                raise DataError(
                    f"{path}: index of {found}, not of token shards; make them with: python -m "
                    f"data_tools.tokenize_corpus --input {path.removesuffix(INDEX_FILE)}"
                )
            if (version := raw.pop("version")) != VERSION:
                raise DataError(
                    f"{path}: version {version}, this program reads version {VERSION}; write the corpus anew with "
                    "python -m data_tools.tokenize_corpus"
                )
            fingerprint = raw.pop("fingerprint")
            raw["tokenizer"] = TokenizerEntry(**raw["tokenizer"])
            raw["shards"] = [ShardEntry(**shard) for shard in raw["shards"]]
            index = cls(**raw)
            tokenizer = index.tokenizer
            check_names(path, [*index.shards, tokenizer], [digest for _, digest in index.tables])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: damaged index ({error}); run data_tools.tokenize_corpus with --overwrite"
            ) from error
        if index.fingerprint != fingerprint:
            raise DataError(f"{path}: its entries do not give its fingerprint: it was changed by hand or damaged")
        return index


class NamedFile(Protocol):
    """An entry of an index: a file's name, and its digest."""

    @property
    def file(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def check_names(path: str | Path, entries: Sequence[NamedFile], digests: Sequence[str] = ()) -> None:
    """DataError if an index at `path` names a file by a path, which could lead anywhere, or gives a digest that is none
    (it becomes a part of a name in the cache)."""
    for entry in entries:
        if not is_file_name(entry.file):
            raise DataError(f"{path}: names {entry.file!r}, which is no plain file name; do not use this index")
    for digest in (*(entry.sha256 for entry in entries), *digests):
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise DataError(f"{path}: {digest!r} is no sha256; do not use this index")


def ranges(ids: list[int]) -> list[list[int]]:
    """Sorted ids as [start, stop) runs."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return runs


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes a file so that it exists whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def rename_durably(temporary: Path, path: Path) -> None:
    """Renames, and makes the new name survive a power cut."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
