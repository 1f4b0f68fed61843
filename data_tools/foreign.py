"""WebDataset shards that others made: their tars read strictly, and indexed so that damage never passes silently.

A tar reader takes a cut or damaged archive for a shorter one; here each header must be sound and the archive must have
its end. Shards of ids get the index of our own corpora and train as they are. Shards of raw text get a `TextIndex`:
the other tools then read them, each document checked by its crc32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import FORMAT, INDEX_FILE, MEMBERS_FILE, VERSION, CorpusIndex, MemberTable, check_names

TEXT_FORMAT = "neomoba-text-shards"
TEXT_SUFFIXES = ("txt", "text", "json")
ID_SUFFIXES = {"u16": "uint16", "u32": "uint32", "i32": "int32", "i64": "int64", "npy": ""}
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A regular file of a tar: its WebDataset key and suffix, and where its bytes lie."""

    key: str
    suffix: str
    offset: int
    size: int


def open_shard(path: Path) -> memoryview:
    """The bytes of a file, mapped."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty file")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def tar_members(path: Path) -> list[Member]:
    """The members of an uncompressed tar. DataError with the byte offset if it is cut or a header is damaged."""
    found = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    raise DataError(f"{path}: cut inside {info.name} at offset {info.offset_data}; get the shard again")
                if info.isfile():
                    # WebDataset's rule: the key ends at the first dot of the file name
                    folder, slash, name = info.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    found.append(Member(folder + slash + stem, suffix.lower(), info.offset_data, info.size))
            end = tar.offset  # where the reader found no further header
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable tar ({error}); get the shard again") from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
            raise DataError(f"{path}: damaged header or no end of archive at offset {end}; get the shard again")
    return found


def _suffix_of(members: list[Member], path: Path, known: tuple[str, ...]) -> str:
    """The one suffix of `known` that stands in a shard."""
    suffixes = sorted({member.suffix for member in members} & set(known))
    if len(suffixes) != 1:
        has = ", ".join(sorted({member.suffix for member in members})[:8]) or "nothing"
        raise DataError(f"{path}: give --suffix: one of {', '.join(known)} (the shard has {has})")
    return suffixes[0]


def content_suffix(path: Path) -> str:
    """Suffix of the members that hold the ids or the text of a shard. DataError if it is not clear."""
    return _suffix_of(tar_members(path), path, (*ID_SUFFIXES, *TEXT_SUFFIXES))


def npy_ids(payload: memoryview, where: str) -> tuple[str, int]:
    """(dtype, bytes before the first id) of an .npy of ids. DataError unless it is one row of 16 to 64 bit integers."""
    try:
        file = io.BytesIO(payload)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{where}: not an .npy file ({error})") from error
    if len(shape) != 1 or dtype.str not in ("<u2", "<u4", "<i4", "<i8"):
        raise DataError(
            f"{where}: holds {dtype.name} of shape {shape}; ids are one row of uint16, uint32, int32, int64"
        )
    return dtype.name, file.tell()


@dataclass(frozen=True, kw_only=True)
class TextShard:
    """One tar of raw text: size in bytes, digest, and its documents."""

    file: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True, kw_only=True)
class TextIndex:
    """The `index.json` of shards of raw text; `members.npz` says where each text lies (`tokens_*`), and its crc32."""

    suffix: str
    documents: int
    text_bytes: int
    members_sha256: str
    shards: list[TextShard]

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps({"format": TEXT_FORMAT, "version": 1} | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> TextIndex:
        """Reads `index.json`; DataError if it is not one of raw text."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if (raw.pop("format"), raw.pop("version")) != (TEXT_FORMAT, 1):
                raise DataError(f"{path}: not an index of raw text; make one with: python -m data_tools.index")
            raw["shards"] = [TextShard(**shard) for shard in raw["shards"]]
            index = cls(**raw)
            check_names(path, index.shards, [index.members_sha256])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged index ({error}); run data_tools.index with --overwrite") from error
        return index


def is_text_index(path: Path) -> bool:
    """True for the `index.json` of shards of raw text."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return TEXT_FORMAT.encode("ascii") in file.read(200)


def foreign_recipe(suffix: str, tokenizer_sha256: str) -> str:
    """`CorpusIndex.recipe` of shards of ids that were made elsewhere."""
    facts = [FORMAT, VERSION, "foreign", suffix, tokenizer_sha256]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def is_foreign(path: Path) -> bool:
    """True for the `index.json` of shards that were made elsewhere, of raw text or of ids."""
    if is_text_index(path):
        return True
    try:
        index = CorpusIndex.from_file(path)
    except (DataError, OSError):  # none, or a damaged one
        return False
    return index.recipe in {foreign_recipe(suffix, index.tokenizer.sha256) for suffix in ID_SUFFIXES}


def text_payloads(path: Path) -> Iterator[tuple[int, memoryview]]:
    """(byte offset, bytes) of each document of an indexed shard of raw text. DataError on damage, with the offset."""
    index = TextIndex.from_file(path.parent / INDEX_FILE)
    number = next((i for i, shard in enumerate(index.shards) if shard.file == path.name), None)
    if number is None:
        raise DataError(f"{path}: not in {INDEX_FILE}; run data_tools.index with --overwrite")
    if (size := path.stat().st_size) != index.shards[number].bytes:
        raise DataError(f"{path}: {size} bytes, the index says {index.shards[number].bytes}; get the shard again")
    members = MemberTable.from_file(path.parent / MEMBERS_FILE, index.members_sha256)
    shard = open_shard(path)
    for row in np.flatnonzero(members.shard == number).tolist():
        offset, size = int(members.tokens_offset[row]), int(members.tokens_size[row])
        payload = shard[offset : offset + size]
        if zlib.crc32(payload) != int(members.tokens_crc32[row]):
            raise DataError(f"{path}: text at byte offset {offset} ({size} bytes) fails its crc32; get the shard again")
        yield offset, payload


def text_problems(folder: Path) -> Iterator[str]:
    """One line for each problem of indexed shards of raw text."""
    from neomoba_dist.data.shards import structural_problems

    index = TextIndex.from_file(folder / INDEX_FILE)
    yield from structural_problems(folder, index.shards)
    for shard in index.shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            continue
        try:
            tar_members(path)
            for _ in text_payloads(path):
                pass
        except DataError as error:
            yield str(error)
        else:
            if hashlib.sha256(open_shard(path)).hexdigest() != shard.sha256:
                yield f"{path}: sha256 differs from the index: changed outside its members"
