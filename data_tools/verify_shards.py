"""Checks everything that can be wrong with a folder of shards before training starts.

Index, tokenizer and member table by digest; missing, cut and extra shards; the sha256 of each shard; each tar header;
the crc32 of each member; that ids lie below the vocabulary; that lengths add up. Prints one line for each problem,
with shard and byte offset, and exits with 1 if there is any.
"""

from __future__ import annotations

import hashlib
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.cli import command_parser, progress, run
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from neomoba_dist.data.index import CorpusIndex, MemberTable, ShardEntry

# after this many a shard is known to be lost, and more lines would hide the other shards
_LINES_PER_SHARD = 5


def member_problems(payload: memoryview, index: CorpusIndex, members: MemberTable, row: int) -> Iterator[str]:
    """Problems of one member pair, each beginning with its byte offset. `payload`: the whole shard."""
    import numpy as np

    arrays = {}
    for name, dtype in (("tokens", index.dtype), ("lengths", "int32")):
        suffix = "len" if name == "lengths" else {"uint16": "u16", "uint32": "u32"}[index.dtype]
        offset, size = (int(getattr(members, f"{name}_{field}")[row]) for field in ("offset", "size"))
        try:
            header = tarfile.TarInfo.frombuf(bytes(payload[offset - 512 : offset]), "ascii", "strict")
            if (header.name, header.size) != (f"{row:09d}.{suffix}", size):
                yield f"offset {offset - 512}: tar header names {header.name!r} of {header.size} bytes"
        except (tarfile.HeaderError, UnicodeError) as error:
            yield f"offset {offset - 512}: tar header damaged ({error})"
        data = payload[offset : offset + size]
        if zlib.crc32(data) != int(getattr(members, f"{name}_crc32")[row]):
            yield f"offset {offset}: {size} bytes of {name} fail their crc32"
            return
        arrays[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    tokens, lengths = arrays["tokens"], arrays["lengths"].astype(np.int64)
    if not len(lengths) or (lengths == 0).any() or np.abs(lengths).sum() != len(tokens):
        yield f"offset {int(members.lengths_offset[row])}: lengths add up to {np.abs(lengths).sum()}, not {len(tokens)}"
    if len(tokens) and int(tokens.max()) >= index.tokenizer.vocab_size:
        yield f"offset {int(members.tokens_offset[row])}: id {tokens.max()}, vocabulary of {index.tokenizer.vocab_size}"


def shard_problems(
    path: Path, entry: ShardEntry, index: CorpusIndex, members: MemberTable, rows: range
) -> Iterator[str]:
    """Problems inside one shard of the right size; `rows` are its members in the table."""
    import numpy as np

    with open(path, "rb") as file:
        payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    found = 0
    documents = tokens = 0
    for row in rows:
        for problem in member_problems(payload, index, members, row):
            found += 1
            yield problem
        start, size = int(members.lengths_offset[row]), int(members.lengths_size[row])
        lengths = np.frombuffer(payload[start : start + size], "<i4")
        documents += int((lengths > 0).sum())
        tokens += int(members.tokens_size[row]) // np.dtype(index.dtype).itemsize
    if not found and (documents, tokens) != (entry.documents, entry.tokens):
        found += 1
        yield f"{documents} documents, {tokens} tokens; the index says {entry.documents}, {entry.tokens}"
    if not found and hashlib.sha256(payload).hexdigest() != entry.sha256:
        yield "sha256 differs from the index: changed outside its members"


def corpus_problems(folder: Path) -> Iterator[str]:
    """One line for each problem of the corpus in `folder`."""
    import numpy as np

    from neomoba_dist.data.index import INDEX_FILE, MEMBERS_FILE, CorpusIndex, MemberTable
    from neomoba_dist.data.shards import structural_problems

    if not (folder / INDEX_FILE).is_file():
        raise DataError(f"{folder}: no finished corpus, {INDEX_FILE} is missing; run data_tools.tokenize_corpus")
    index = CorpusIndex.from_file(folder / INDEX_FILE)
    yield from structural_problems(folder, index.shards)
    tokenizer = folder / index.tokenizer.file
    if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != index.tokenizer.sha256:
        yield f"{tokenizer}: missing or not the tokenizer of these shards"
    for name in ("documents", "tokens"):
        total = sum(getattr(entry, name) for entry in index.shards)
        if total != getattr(index, name):
            yield f"{folder / INDEX_FILE}: {getattr(index, name)} {name}, its shards have {total}"
    members = MemberTable.from_file(folder / MEMBERS_FILE, index.members_sha256)
    borders = np.searchsorted(members.shard, np.arange(len(index.shards) + 1)).tolist()
    with progress(sum(entry.bytes for entry in index.shards), "verify", "B") as bar:
        for entry, first, last in zip(index.shards, borders, borders[1:], strict=False):
            path = folder / entry.file
            if path.is_file() and path.stat().st_size == entry.bytes:
                for number, problem in enumerate(shard_problems(path, entry, index, members, range(first, last))):
                    if number == _LINES_PER_SHARD:
                        yield f"{path}: and more"
                        break
                    yield f"{path}: {problem}"
            bar.update(entry.bytes)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("verify_shards", __doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="folder of shards")
    args = parser.parse(argv)
    found = 0
    for folder in args.folder:
        for problem in corpus_problems(folder):
            found += 1
            print(problem, flush=True)
    if found:
        raise DataError(f"{found} problems; restore the files or run data_tools.tokenize_corpus with --overwrite")
    print("all shards are as the index says")


if __name__ == "__main__":
    run(main)
