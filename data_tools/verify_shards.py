"""Checks everything that can be wrong with a folder of shards before training starts.

Index, tokenizer and tables by digest; missing, cut and extra shards; the sha256 of each shard; each tar header; the
crc32 of each member; that ids lie in the vocabulary; that lengths add up. Prints one line for each problem, with shard
and byte offset, and exits with 1 if there is any.
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
from neomoba_dist.errors import FailedError

if TYPE_CHECKING:
    import numpy as np

    from neomoba_dist.data.index import CorpusIndex, MemberTable, ShardEntry

# after this many a shard is known to be lost, and more lines would hide the other shards
_LINES_PER_SHARD = 5


def _header_problem(header: bytes, size: int, suffix: str) -> str | None:
    """What is wrong with a member's tar header."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"tar header damaged ({error})"
    if not found.name.endswith(suffix) or found.size != size:
        return f"tar header names {found.name!r} of {found.size} bytes"
    return None


def member_problems(payload: memoryview, index: CorpusIndex, members: MemberTable, row: int) -> Iterator[str]:
    """Problems of one member pair, each beginning with its byte offset. `payload`: the whole shard."""
    import numpy as np

    from neomoba_dist.data.shards import ID_SUFFIX

    arrays = {}
    paired = int(members.lengths_size[row]) > 0
    for name, dtype in (("tokens", index.dtype), ("lengths", "int32"))[: 1 + paired]:
        offset, size = (int(getattr(members, f"{name}_{field}")[row]) for field in ("offset", "size"))
        if paired:
            suffix = "len" if name == "lengths" else ID_SUFFIX[index.dtype]
            problem = _header_problem(bytes(payload[offset - 512 : offset]), size, f".{suffix}")
            if problem:
                yield f"offset {offset - 512}: {problem}"
        data = payload[offset : offset + size]
        if zlib.crc32(data) != int(getattr(members, f"{name}_crc32")[row]):
            yield f"offset {offset}: {size} bytes of {name} fail their crc32"
            return
        arrays[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    tokens = arrays["tokens"]
    if paired:
        lengths = arrays["lengths"].astype(np.int64)
        if not len(lengths) or (lengths == 0).any() or np.abs(lengths).sum() != len(tokens):
            start = int(members.lengths_offset[row])
            yield f"offset {start}: lengths add up to {np.abs(lengths).sum()}, not {len(tokens)}"
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < index.tokenizer.vocab_size:
        start = int(members.tokens_offset[row])
        yield (f"offset {start}: ids from {tokens.min()} to {tokens.max()}, vocabulary of {index.tokenizer.vocab_size}")


def shard_problems(
    folder: Path, entry: ShardEntry, index: CorpusIndex, members: MemberTable, rows: range, lengths: np.ndarray
) -> Iterator[str]:
    """Problems inside one shard of the right size. `rows`: its members in the table; `lengths`: its documents'."""
    import numpy as np

    from neomoba_dist.data.shards import stored_lengths

    with open(folder / entry.file, "rb") as file:
        payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    found = [problem for row in rows for problem in member_problems(payload, index, members, row)]
    if not found:
        try:
            stored = stored_lengths(folder, entry, index.dtype, members, rows.start, rows.stop)
            if not np.array_equal(stored, lengths):
                found = ["its document lengths differ from documents.npz"]
        except DataError as error:
            found = [str(error).removeprefix(f"{folder / entry.file}: ")]
    if not found and hashlib.sha256(payload).hexdigest() != entry.sha256:
        found = ["sha256 differs from the index: changed outside its members"]
    yield from found[:_LINES_PER_SHARD]
    if len(found) > _LINES_PER_SHARD:
        yield f"and {len(found) - _LINES_PER_SHARD} more"


def corpus_problems(folder: Path) -> Iterator[str]:
    """One line for each problem of the corpus in `folder`."""
    import numpy as np

    from data_tools.foreign import is_text_index, text_problems
    from neomoba_dist.data import index as layout
    from neomoba_dist.data.shards import structural_problems

    path = folder / layout.INDEX_FILE
    if is_text_index(path):
        yield from text_problems(folder)
        return
    if not path.is_file():
        raise DataError(f"{folder}: no finished corpus, {path.name} is missing; run data_tools.tokenize_corpus")
    index = layout.CorpusIndex.from_file(path)
    yield from structural_problems(folder, index.shards)
    tokenizer = folder / index.tokenizer.file
    if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != index.tokenizer.sha256:
        yield f"{tokenizer}: missing or not the tokenizer of these shards"
    for name in ("documents", "tokens"):
        total = sum(getattr(entry, name) for entry in index.shards)
        if total != getattr(index, name):
            yield f"{path}: {getattr(index, name)} {name}, its shards have {total}"
    members = layout.MemberTable.from_file(folder / layout.MEMBERS_FILE, index.members_sha256)
    table = layout.DocumentTable.from_file(folder / layout.DOCUMENTS_FILE, index.documents_sha256)
    for least, documents in table.subsets.items():
        if not np.array_equal(documents, np.flatnonzero(table.lengths >= least)):
            yield f"{folder / layout.DOCUMENTS_FILE}: the subset {least}+ is not that of the lengths"
    if index.loss_spans_sha256 is not None:
        spans = layout.LossSpans.from_file(folder / layout.LOSS_SPANS_FILE, index.loss_spans_sha256)
        borders = np.stack((spans.starts, spans.stops), axis=1)
        inside = len(borders) > 0 and borders.min() >= 0 and borders.max() <= index.tokens
        if not inside or (np.diff(borders.ravel()) < 0).any() or (spans.starts >= spans.stops).any():
            yield f"{folder / layout.LOSS_SPANS_FILE}: no ascending spans of the {index.tokens} tokens"
    rows = np.searchsorted(members.shard, np.arange(len(index.shards) + 1)).tolist()
    first = 0
    with progress(sum(entry.bytes for entry in index.shards), "verify", "B") as bar:
        for number, entry in enumerate(index.shards):
            lengths = table.lengths[first : first + entry.documents]
            first += entry.documents
            if (folder / entry.file).is_file() and (folder / entry.file).stat().st_size == entry.bytes:
                own = range(rows[number], rows[number + 1])
                for problem in shard_problems(folder, entry, index, members, own, lengths):
                    yield f"{folder / entry.file}: {problem}"
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
        raise FailedError(f"{found} problems; restore the files or run data_tools.tokenize_corpus with --overwrite")
    print("all shards are as the index says")


if __name__ == "__main__":
    run(main)
