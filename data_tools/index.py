"""Builds the index of WebDataset shards that were made elsewhere, and leaves the shards as they are.

FOLDER holds *.tar with one document per sample. Ids (.u16 .u32 .i32 .i64: little-endian; .npy: one row) need
--tokenizer, the one that made them; the folder then trains like one of tokenize_corpus, without a copy. Shards of
tokenize_corpus whose index was lost are indexed alike. Raw text (.txt; .json with "text" or "content") is not
tokenised here: give the folder to tokenize_corpus, which then notices every damage. Writes members.npz, for ids also
documents.npz and the tokenizer, and, last, FOLDER/index.json.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.cli import command_parser, progress, run
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from data_tools.corpus_index import CorpusCounts
    from neomoba_dist.data.index import MemberTable
    from neomoba_dist.data.tokenizer import Tokenizer


class _Members:
    """The growing member table."""

    def __init__(self) -> None:
        from neomoba_dist.data.index import MemberTable

        self.columns: dict[str, list[int]] = {field.name: [] for field in fields(MemberTable)}

    def add(self, shard: int, offset: int, payload: memoryview, lengths: tuple[int, bytes] = (0, b"")) -> None:
        """One member; `lengths`: offset and bytes of its `.len`, where it has one."""
        values = (shard, offset, len(payload), zlib.crc32(payload), lengths[0], len(lengths[1]), zlib.crc32(lengths[1]))
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def table(self) -> MemberTable:
        """The finished table."""
        from neomoba_dist.data.index import MemberTable

        return MemberTable.from_columns(self.columns)


@dataclass
class _IdShards:
    """What is known of shards of ids while they are read."""

    suffix: str
    counts: CorpusCounts
    members: _Members
    dtype: str = ""

    def scan(self, path: Path, number: int) -> tuple[int, int, memoryview]:
        """Adds the documents of one shard; returns how many, their tokens, and the shard's bytes."""
        import numpy as np

        from data_tools.foreign import ID_SUFFIXES, npy_ids, open_shard, tar_members

        payload = open_shard(path)
        found = tar_members(path)
        lengths = {member.key: member for member in found if member.suffix == "len"}
        documents: list[np.ndarray] = []
        pieces: list[np.ndarray] = []
        for member in found:
            if member.suffix != self.suffix or not member.size:
                continue
            where = f"{path}: {member.key} at offset {member.offset}"
            data, dtype, skipped = payload[member.offset : member.offset + member.size], ID_SUFFIXES[self.suffix], 0
            if not dtype:
                dtype, skipped = npy_ids(data, where)
            if dtype != (self.dtype or dtype):
                raise DataError(f"{where}: {dtype}, the members before it {self.dtype}; index them in a folder each")
            self.dtype = dtype
            data = data[skipped:]
            if not data:
                continue
            if len(data) % np.dtype(dtype).itemsize:
                raise DataError(f"{where}: {len(data)} bytes are no whole number of {dtype}")
            ids = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
            if member.key in lengths:
                at = lengths[member.key]
                stored = bytes(payload[at.offset : at.offset + at.size])
                self.members.add(number, member.offset + skipped, data, (at.offset, stored))
                documents += _whole_documents(ids, np.frombuffer(stored, "<i4"), pieces, where)
            else:
                self.members.add(number, member.offset + skipped, data)
                documents.append(ids)
        if pieces:
            raise DataError(f"{path}: its last document goes on in no other member; get the shard again")
        try:
            self.counts.add(documents)
        except DataError as error:
            raise DataError(f"{path}: {error}; give --tokenizer the one that made them") from error
        return len(documents), sum(map(len, documents)), payload


def _whole_documents(ids: np.ndarray, lengths: np.ndarray, pieces: list[np.ndarray], where: str) -> list[np.ndarray]:
    """The documents that end in a member with lengths; `pieces` carries the one that does not into the next."""
    import numpy as np

    if np.abs(lengths.astype(np.int64)).sum() != len(ids) or (lengths == 0).any():
        raise DataError(f"{where}: its .len does not add up to its {len(ids)} ids")
    documents = []
    start = 0
    for length in lengths.tolist():
        pieces.append(ids[start : start + abs(length)])
        start += abs(length)
        if length > 0:
            documents.append(np.concatenate(pieces))
            pieces.clear()
    return documents


def index_ids(
    folder: Path, shards: list[Path], suffix: str, tokenizer: Tokenizer, bar: tqdm[Any], allow_unknown: bool
) -> str:
    """Indexes shards of ids; returns a line on what they hold. DataError if most ids say "unknown"."""
    from data_tools.corpus_index import CorpusCounts, write_index
    from data_tools.foreign import foreign_recipe
    from data_tools.unknown import UnknownText
    from neomoba_dist.data.index import INDEX_FILE, ShardEntry

    found = _IdShards(suffix, CorpusCounts(tokenizer.vocab_size), _Members())
    entries = []
    for number, path in enumerate(shards):
        documents, tokens, payload = found.scan(path, number)
        digest = hashlib.sha256(payload).hexdigest()
        entries.append(
            ShardEntry(file=path.name, bytes=len(payload), sha256=digest, documents=documents, tokens=tokens)
        )
        bar.update(len(payload))
    if not found.counts.lengths:
        raise DataError(f"{folder}: its shards hold no id")
    ordinary, unknown = found.counts.known_and_unknown(tokenizer)
    counted = UnknownText(tokens=ordinary + unknown, unknown_tokens=unknown)
    counted.report(allow_unknown, "tokenize the text again with one that knows it")
    (folder / INDEX_FILE).unlink(missing_ok=True)
    tokenizer.save(folder)
    recipe = foreign_recipe(suffix, tokenizer.sha256)
    index = write_index(folder, found.counts, tokenizer, found.dtype, entries, found.members.table(), recipe)
    return f"{index.documents} documents, {index.tokens} tokens in {len(entries)} shards, {index.unknown}"


def index_text(folder: Path, shards: list[Path], suffix: str, bar: tqdm[Any]) -> str:
    """Indexes shards of raw text; returns a line on what they hold."""
    from data_tools.foreign import TextIndex, TextShard, open_shard, tar_members
    from neomoba_dist.data import index as layout

    members = _Members()
    entries = []
    for number, path in enumerate(shards):
        payload = open_shard(path)
        found = [member for member in tar_members(path) if member.suffix == suffix]
        for member in found:
            members.add(number, member.offset, payload[member.offset : member.offset + member.size])
        digest = hashlib.sha256(payload).hexdigest()
        entries.append(TextShard(file=path.name, bytes=len(payload), sha256=digest, documents=len(found)))
        bar.update(len(payload))
    table = members.table().to_bytes()
    index = TextIndex(
        suffix=suffix,
        documents=sum(entry.documents for entry in entries),
        text_bytes=sum(members.columns["tokens_size"]),
        members_sha256=hashlib.sha256(table).hexdigest(),
        shards=entries,
    )
    (folder / layout.INDEX_FILE).unlink(missing_ok=True)
    layout.write_atomically(folder / layout.MEMBERS_FILE, table)
    layout.write_atomically(folder / layout.INDEX_FILE, index.to_json().encode("utf-8"))
    return f"{index.documents} documents, {index.text_bytes} bytes of text in {len(entries)} shards"


def check_existing(folder: Path, tokenizer: str | None) -> None:
    """DataError if the index of a folder is not that of its shards and of this tokenizer."""
    from data_tools.foreign import TextIndex, is_text_index
    from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
    from neomoba_dist.data.shards import structural_problems
    from neomoba_dist.data.tokenizer import load_tokenizer

    file = folder / INDEX_FILE
    index = TextIndex.from_file(file) if is_text_index(file) else CorpusIndex.from_file(file)
    for problem in structural_problems(folder, index.shards):
        raise DataError(f"{problem}; if the shards are right, add --overwrite")
    if isinstance(index, CorpusIndex) and tokenizer and load_tokenizer(tokenizer).sha256 != index.tokenizer.sha256:
        raise DataError(f"{file}: of another tokenizer; add --overwrite to index the shards anew")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("index", __doc__)
    parser.add_argument("folder", type=Path, help="folder of *.tar")
    parser.add_argument("--tokenizer", help="of shards of ids: the tokenizer that made them, as in tokenize_corpus")
    parser.add_argument("--suffix", help="of the members to take (default: the one that is known)")
    parser.add_argument("--allow_unknown", action="store_true", help="also if most of the ids stand for unknown text")
    parser.add_argument("--overwrite", action="store_true", help="replace the index of FOLDER")
    args = parser.parse(argv)

    from data_tools.foreign import ID_SUFFIXES, TEXT_SUFFIXES, content_suffix
    from neomoba_dist.data.index import INDEX_FILE, LOSS_SPANS_FILE
    from neomoba_dist.data.tokenizer import load_tokenizer

    shards = sorted(args.folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{args.folder}: no *.tar in this folder")
    if (args.folder / INDEX_FILE).is_file() and not args.overwrite:
        check_existing(args.folder, args.tokenizer)
        print(f"{args.folder}: has its index already; data_tools.verify_shards checks every byte")
        return
    if (args.folder / LOSS_SPANS_FILE).is_file():
        raise DataError(
            f"{args.folder / LOSS_SPANS_FILE}: says which tokens the loss counts, and is named by no index made here; "
            "run tokenize_chat again"
        )
    suffix = args.suffix.lstrip(".") if args.suffix else content_suffix(shards[0])
    if suffix not in (*ID_SUFFIXES, *TEXT_SUFFIXES):
        raise DataError(f"--suffix {suffix}: choose from {', '.join((*ID_SUFFIXES, *TEXT_SUFFIXES))}")
    if suffix in ID_SUFFIXES and args.tokenizer is None:
        raise DataError(f"{shards[0]}: holds ids (.{suffix}); add --tokenizer, the one that made them")
    with progress(sum(path.stat().st_size for path in shards), "index", "B") as bar:
        if suffix in ID_SUFFIXES:
            said = index_ids(args.folder, shards, suffix, load_tokenizer(args.tokenizer), bar, args.allow_unknown)
        else:
            said = index_text(args.folder, shards, suffix, bar)
    print(f"{args.folder / INDEX_FILE}: {said}")


if __name__ == "__main__":
    run(main)
