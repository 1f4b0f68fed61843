"""Tar shards of token ids: written so that any WebDataset reader opens them, read by byte offset.

A member pair `K.u16` (or `.u32`: little-endian ids) and `K.len` (little-endian int32: the length in tokens of each
document part in it) holds about 64k tokens. A document that does not fit whole into what is left of a member starts
the next one; only one longer than a member is cut, and every part of it but the last has its length negated: "goes on
in the next member". No document crosses a shard. Headers carry no time and no owner: equal input, equal bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Protocol

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import MemberTable, ShardEntry, rename_durably

MEMBER_TOKENS = 65_536
TAR_BLOCK = 512
ID_SUFFIX = {"uint16": "u16", "uint32": "u32"}
REMAKE = "restore the file or run data_tools.tokenize_corpus with --overwrite"


def shard_name(number: int) -> str:
    """File name of the number-th shard."""
    return f"shard-{number:05d}.tar"


def id_dtype(vocab_size: int) -> str:
    """The smaller of "uint16" and "uint32" that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class _ShardFile:
    """One tar on its way to disk under a temporary name, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.tokens = self.position = 0
        self._sha256 = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in finish)

    def add_member(self, name: str, payload: bytes) -> int:
        """Appends one member; returns the byte offset of its payload."""
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.position
        self._write(payload + bytes(-len(payload) % TAR_BLOCK))
        return offset

    def finish(self) -> ShardEntry:
        """Writes the end of the archive (two empty blocks) and gives the file its name."""
        self._write(bytes(2 * TAR_BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename_durably(self._temporary, self.path)
        return ShardEntry(
            file=self.path.name,
            bytes=self.position,
            sha256=self._sha256.hexdigest(),
            documents=self.documents,
            tokens=self.tokens,
        )

    def _write(self, payload: bytes) -> None:
        self._sha256.update(payload)
        self.position += self._file.write(payload)


class ShardWriter:
    """Writes documents into shards of about `shard_bytes` in `folder`; `close` finishes the last one."""

    def __init__(self, folder: Path, dtype: str, shard_bytes: int) -> None:
        self._folder, self._dtype, self._shard_bytes = folder, np.dtype(dtype).newbyteorder("<"), shard_bytes
        self._suffix = ID_SUFFIX[dtype]
        self._shard: _ShardFile | None = None
        self._shards: list[ShardEntry] = []
        self._members: dict[str, list[int]] = {field.name: [] for field in fields(MemberTable)}
        self._parts: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._filled = 0

    def add(self, ids: np.ndarray) -> None:
        """Appends one document: integer ids [n], n >= 1, each within the dtype."""
        if self._shard and self._shard.position + self._filled * self._dtype.itemsize >= self._shard_bytes:
            self._finish_shard(self._shard)
        shard = self._shard = self._shard or _ShardFile(self._folder / shard_name(len(self._shards)))
        if self._filled and self._filled + len(ids) > MEMBER_TOKENS:
            self._write_member(shard)
        for start in range(0, len(ids), MEMBER_TOKENS):
            part = ids[start : start + MEMBER_TOKENS]
            goes_on = start + MEMBER_TOKENS < len(ids)
            self._parts.append(part)
            self._lengths.append(-len(part) if goes_on else len(part))
            self._filled += len(part)
            if goes_on:
                self._write_member(shard)
        shard.documents += 1
        shard.tokens += len(ids)

    def close(self) -> tuple[list[ShardEntry], MemberTable]:
        """Finishes the last shard; returns the entries for the index and the member table."""
        if self._shard:
            self._finish_shard(self._shard)
        return self._shards, MemberTable.from_columns(self._members)

    def _write_member(self, shard: _ShardFile) -> None:
        """Writes the collected parts as one pair; its key counts over the whole corpus."""
        key = f"{len(self._members['shard']):09d}"
        self._members["shard"].append(len(self._shards))
        tokens = np.concatenate(self._parts).astype(self._dtype).tobytes()
        lengths = np.array(self._lengths, "<i4").tobytes()
        for name, suffix, payload in (("tokens", self._suffix, tokens), ("lengths", "len", lengths)):
            self._members[f"{name}_offset"].append(shard.add_member(f"{key}.{suffix}", payload))
            self._members[f"{name}_size"].append(len(payload))
            self._members[f"{name}_crc32"].append(zlib.crc32(payload))
        self._parts, self._lengths, self._filled = [], [], 0

    def _finish_shard(self, shard: _ShardFile) -> None:
        if self._filled:
            self._write_member(shard)
        self._shards.append(shard.finish())
        self._shard = None


def stored_lengths(
    folder: Path, entry: ShardEntry, dtype: str, members: MemberTable, first: int, last: int
) -> np.ndarray:
    """Length in tokens of each document of a shard, read from members [first, last) of the table: int64 [documents].

    A member of a foreign shard is one document. DataError on damage.
    """
    path = folder / entry.file
    parts = [np.zeros(0, "<i4")]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as payload:
        for row in range(first, last):
            offset, size = int(members.lengths_offset[row]), int(members.lengths_size[row])
            stored = payload[offset : offset + size]
            if len(stored) != size or zlib.crc32(stored) != int(members.lengths_crc32[row]):
                raise DataError(f"{path}: lengths at byte offset {offset} ({size} bytes) fail their crc32; {REMAKE}")
            whole = np.array([int(members.tokens_size[row]) // np.dtype(dtype).itemsize], "<i4")
            parts.append(np.frombuffer(stored, "<i4") if size else whole)
    signed = np.concatenate(parts).astype(np.int64)
    ends = np.cumsum(np.abs(signed))[signed > 0]
    lengths = np.diff(ends, prepend=0)
    if len(lengths) != entry.documents or lengths.sum() != entry.tokens:
        raise DataError(
            f"{path}: holds {len(lengths)} documents and {lengths.sum()} tokens, the index says {entry.documents} and "
            f"{entry.tokens}; {REMAKE}"
        )
    return lengths


class FileSize(Protocol):
    """An entry of an index: the file's name, and its size in bytes."""

    @property
    def file(self) -> str: ...
    @property
    def bytes(self) -> int: ...


def check_files(folder: Path, shards: Sequence[FileSize]) -> None:
    """Structural check that costs one stat per shard: DataError names the first missing, cut or extra shard."""
    for problem in structural_problems(folder, shards):
        raise DataError(problem)


def structural_problems(folder: Path, shards: Sequence[FileSize]) -> list[str]:
    """One line for each shard that is missing, has another size than the index says, or is not in the index."""
    problems = [problem for entry in shards if (problem := shard_problem(folder / entry.file, entry.bytes))]
    return problems + extra_problems(folder, shards)


def shard_problem(path: Path, size: int) -> str | None:
    """What is wrong with the file of a shard that should have `size` bytes, as far as one stat tells."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: shard is missing; {REMAKE}"
    if found != size:
        return f"{path}: {found} bytes, the index says {size} (differs from offset {min(found, size)} on); {REMAKE}"
    return None


def extra_problems(folder: Path, shards: Sequence[FileSize]) -> list[str]:
    """One line for each shard of the folder that is not in the index."""
    extra = {path.name for path in folder.glob("*.tar")} - {entry.file for entry in shards}
    return [f"{folder / name}: extra shard, not in the index; remove it" for name in sorted(extra)]
