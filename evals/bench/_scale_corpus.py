"""A corpus of any number of documents that takes little disk: its shards are sparse files, all tokens are 0.

Index, tables and tar headers are those of a corpus that `data_tools.tokenize_corpus` makes, with lengths drawn from a
log-normal law; of its members' lengths a shard holds those of the first one alone.
"""

from __future__ import annotations

import functools
import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evals.cli import progress
from neomoba_dist.data.index import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    MEMBERS_FILE,
    CorpusIndex,
    MemberTable,
    ShardEntry,
    TokenizerEntry,
    write_atomically,
)
from neomoba_dist.data.shards import MEMBER_TOKENS, TAR_BLOCK, shard_name

SHARD_DOCUMENTS = 100_000
_SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": None, "eos": None}


def lengths_of(shard: int, documents: int) -> np.ndarray:
    """Lengths in tokens of a shard's documents, int64; 1,000 on average, half of them below 650."""
    draws = np.random.Generator(np.random.Philox(key=shard)).standard_normal(documents, np.float32)
    return np.clip(np.exp(6.48 + 0.92 * draws), 8, 200_000).astype(np.int64)


def make_corpus(folder: Path, documents: int) -> None:
    """Write the corpus into a folder, unless it is there."""
    if (folder / INDEX_FILE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [min(SHARD_DOCUMENTS, documents - first) for first in range(0, documents, SHARD_DOCUMENTS)]
    shards: list[ShardEntry] = []
    columns: dict[str, list[np.ndarray]] = {}
    with (
        zipfile.ZipFile(folder / DOCUMENTS_FILE, "w", allowZip64=True) as archive,
        archive.open("lengths.npy", "w", force_zip64=True) as table,
    ):
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents,)}
        np.lib.format.write_array_header_1_0(table, header)
        for number, count in enumerate(progress(sizes, len(sizes), f"{documents} documents", "shard")):
            lengths = lengths_of(number, count)
            table.write(lengths.tobytes())
            shards.append(_write_shard(folder, number, lengths, columns))
    members = MemberTable(**{name: np.concatenate(parts) for name, parts in columns.items()})
    write_atomically(folder / MEMBERS_FILE, members.to_bytes())
    digests = []
    for name in (MEMBERS_FILE, DOCUMENTS_FILE):
        with open(folder / name, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    tokenizer = TokenizerEntry(
        file="tokenizer.json",
        kind="wordpiece",
        sha256="0" * 64,
        vocab_size=32_000,
        special=_SPECIAL,
        reserved_ranges=[],
    )
    index = CorpusIndex(
        dtype="uint16",
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        unigram_entropy=0.0,
        length_histogram=[],
        subsets=[],
        tokenizer=tokenizer,
        members_sha256=digests[0],
        documents_sha256=digests[1],
        recipe="generated",
        shards=shards,
    )
    write_atomically(folder / INDEX_FILE, index.to_json().encode("ascii"))


def _write_shard(folder: Path, number: int, lengths: np.ndarray, columns: dict[str, list[np.ndarray]]) -> ShardEntry:
    """Write a shard, add its members to the columns of their table."""
    tokens, path = int(lengths.sum()), folder / shard_name(number)
    first_lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), MEMBER_TOKENS)) + 1].astype("<i4").tobytes()
    rows = []
    with open(path, "wb") as file:
        for member, size, offset in _places(tokens, len(first_lengths)):
            lengths_offset = offset - 2 * TAR_BLOCK - _rounded(len(first_lengths)) if member == 0 else offset
            info = tarfile.TarInfo(f"{number:05d}-{member:06d}.u16")
            info.size = size
            file.seek(offset - TAR_BLOCK)
            file.write(info.tobuf())
            held = first_lengths if member == 0 else b""
            if held:
                file.seek(lengths_offset)
                file.write(held)
            rows.append((number, offset, size, _crc32_of_zeros(size), lengths_offset, len(held) or 4, zlib.crc32(held)))
        end = _rounded(offset + size) + 2 * TAR_BLOCK
        file.truncate(end)
    names = ("shard", "tokens_offset", "tokens_size", "tokens_crc32", "lengths_offset", "lengths_size", "lengths_crc32")
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        dtype = np.int32 if name == "shard" else np.uint32 if name.endswith("crc32") else np.int64
        columns.setdefault(name, []).append(np.array(column, dtype))
    digest = hashlib.sha256(f"{number} {lengths.sum()}".encode()).hexdigest()  # no one reads a terabyte of zeros
    return ShardEntry(file=path.name, bytes=end, sha256=digest, documents=len(lengths), tokens=tokens)


def _places(tokens: int, lengths_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(number, bytes, byte offset) of the token payload of each member."""
    offset = 2 * TAR_BLOCK + _rounded(lengths_bytes) + TAR_BLOCK
    for member, first in enumerate(range(0, tokens, MEMBER_TOKENS)):
        size = 2 * min(MEMBER_TOKENS, tokens - first)
        yield member, size, offset
        offset += _rounded(size) + TAR_BLOCK


def _rounded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


@functools.cache
def _crc32_of_zeros(size: int) -> int:
    return zlib.crc32(bytes(size))
