"""Shards: what is written is read back, WebDataset opens it, and no damage passes unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools import verify_shards
from data_tools.corpus_index import CorpusCounts, write_index
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    MEMBERS_FILE,
    SUBSET_LENGTHS,
    CorpusIndex,
    DocumentTable,
    MemberTable,
    ShardEntry,
    TokenizerEntry,
    ranges,
)
from neomoba_dist.data.reader import TokenReader
from neomoba_dist.data.shards import MEMBER_TOKENS, ShardWriter, id_dtype, stored_lengths
from neomoba_dist.data.stored import Columns, fetch, map_file
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_tokenizer


def _documents(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = [1, 3, 500, MEMBER_TOKENS - 2, 2, 3 * MEMBER_TOKENS + 17, 40_000, 40_000, MEMBER_TOKENS, 5]
    return [rng.integers(0, np.iinfo(dtype).max, n, dtype=np.int64, endpoint=True) for n in lengths]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("shard_bytes", [1, 300_000, 10**9])
def test_documents_come_back(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    documents = _documents(dtype)
    writer = ShardWriter(tmp_path, dtype, shard_bytes)
    for document in documents:
        writer.add(document)
    entries, members = writer.close()
    members = MemberTable.from_file(*_save(tmp_path, members))
    assert {1: len(documents), 300_000: len(entries), 10**9: 1}[shard_bytes] == len(entries)
    lengths = np.array([len(document) for document in documents])
    borders = np.searchsorted(members.shard, np.arange(len(entries) + 1)).tolist()
    stored = [
        stored_lengths(tmp_path, e, dtype, members, a, b) for e, (a, b) in zip(entries, pairwise(borders), strict=True)
    ]
    assert np.array_equal(np.concatenate(stored), lengths)
    columns = Columns(tmp_path / MEMBERS_FILE)
    reader = TokenReader(
        _index(dtype, entries),
        lambda shard: MemberTable.of_shard(columns, shard),
        lambda shard: tmp_path / entries[shard].file,
        maps=2,
    )
    # all documents at once, in another order, and a stretch that crosses members
    order = np.random.default_rng(0).permutation(len(documents))
    starts, places = (np.cumsum(lengths) - lengths)[order], np.cumsum(lengths[order]) - lengths[order]
    out = np.zeros(lengths.sum(), reader.dtype)
    assert reader.read(starts, lengths[order], out, places) == {}
    assert np.array_equal(out, np.concatenate([documents[i] for i in order]))
    everything = np.concatenate(documents)
    begin, size = np.array([490, 70_000]), np.array([200_000, 3])
    out = np.zeros(200_003, reader.dtype)
    reader.read(begin, size, out, np.array([0, 200_000]))
    assert np.array_equal(out, np.concatenate([everything[490:200_490], everything[70_000:70_003]]))
    assert (members.tokens_size <= MEMBER_TOKENS * np.dtype(dtype).itemsize).all()


def _index(dtype: str, entries: list[ShardEntry]) -> CorpusIndex:
    vocabulary = {"file": "t", "kind": "k", "sha256": "", "vocab_size": 1 << 32, "special": {}, "reserved_ranges": []}
    totals = {"documents": 0, "tokens": 0, "unigram_entropy": 0.0, "length_histogram": [], "subsets": []}
    digests = {"members_sha256": "", "documents_sha256": "", "recipe": ""}
    return CorpusIndex(dtype=dtype, shards=entries, tokenizer=TokenizerEntry(**vocabulary), **totals, **digests)


def _save(folder: Path, members: MemberTable) -> tuple[Path, str]:
    (folder / MEMBERS_FILE).write_bytes(members.to_bytes())
    return folder / MEMBERS_FILE, hashlib.sha256(members.to_bytes()).hexdigest()


def test_webdataset_reads_every_member(corpus: Corpus) -> None:
    urls = [str(corpus.folder / entry.file) for entry in corpus.index.shards]
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(len(samples))]
    ids = np.concatenate([np.frombuffer(sample["u16"], "<u2") for sample in samples])
    lengths = np.concatenate([np.frombuffer(sample["len"], "<i4") for sample in samples])
    assert len(ids) == corpus.tokens
    assert (lengths > 0).sum() == corpus.documents
    # the same ids as through the index
    picked = np.random.default_rng(0).integers(0, corpus.tokens, 200)
    out = np.zeros(200, corpus.reader.dtype)
    corpus.reader.read(picked, np.ones(200, np.int64), out, np.arange(200))
    assert out.tolist() == ids[picked].tolist()


def test_first_document_decodes_to_its_text(corpus: Corpus) -> None:
    text = (corpus.folder.parent / "text" / "documents.jsonl").read_text(encoding="utf-8").splitlines()[0]
    length = corpus.document_lengths[:1]
    ids = np.empty(int(length[0]), corpus.reader.dtype)
    corpus.reader.read(np.zeros(1, np.int64), length, ids, np.zeros(1, np.int64))
    assert corpus.tokenizer().decode(ids[1:-1]) == json.loads(text)["text"]
    assert (ids[0], ids[-1]) == (corpus.special.cls, corpus.special.sep)


def test_document_table_lists_the_long_documents(corpus: Corpus) -> None:
    table = DocumentTable.from_file(corpus.folder / DOCUMENTS_FILE, corpus.index.documents_sha256)
    members = MemberTable.from_file(corpus.folder / MEMBERS_FILE, corpus.index.members_sha256)
    borders = np.searchsorted(members.shard, np.arange(len(corpus.index.shards) + 1)).tolist()
    shards = zip(corpus.index.shards, pairwise(borders), strict=True)
    stored = np.concatenate(
        [stored_lengths(corpus.folder, entry, corpus.index.dtype, members, a, b) for entry, (a, b) in shards]
    )
    assert np.array_equal(table.lengths, stored)
    assert list(table.subsets) == list(SUBSET_LENGTHS) == [1024, 2048, 8192, 32_768]
    for least, documents, tokens in corpus.index.subsets:
        assert table.subsets[least].tolist() == [i for i, n in enumerate(stored.tolist()) if n >= least]
        assert (len(table.subsets[least]), stored[stored >= least].sum()) == (documents, tokens)
    assert corpus.index.subsets[0][1] > corpus.index.subsets[1][1] > 0


def test_a_stretch_is_read_without_what_lies_around_it(tmp_path: Path) -> None:
    """From the disk, as the system counts it; where files lie in memory there is nothing to count."""

    def from_disk() -> int:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

    path = tmp_path / "shard"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 24))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    whole, before = map_file(path), from_disk()
    fetch(whole, 5_000_000, 5_131_072)
    fetch(whole, len(whole) + mmap.PAGESIZE, len(whole) + 2 * mmap.PAGESIZE)  # of a file that was cut
    assert len(whole[5_000_000:5_131_072]) == 131_072
    assert from_disk() - before <= 131_072 + 2 * mmap.PAGESIZE


def test_id_dtype_and_ranges() -> None:
    assert id_dtype(65_536) == "uint16"
    assert id_dtype(65_537) == "uint32"
    assert ranges([0, 1, 2, 5, 7, 8]) == [[0, 3], [5, 6], [7, 9]]


def test_intact_corpus_verifies(corpus: Corpus) -> None:
    assert list(verify_shards.corpus_problems(corpus.folder)) == []


def test_missing_index_names_key_and_command(copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=r"neomoba.data.validation: no finished corpus .*tokenize_corpus --input"):
        open_corpus(copy, key="neomoba.data.validation")


def _unlink(path: Path) -> None:
    path.unlink()


def _cut_to(size: Callable[[int], int]) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        payload = path.read_bytes()
        path.write_bytes(payload[: size(len(payload))])

    return cut


def _swap(path: Path) -> None:
    other = path.with_name("shard-00000.tar")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def _add(path: Path) -> None:
    shutil.copy(path, path.with_name("shard-99999.tar"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unlink, "shard-00001.tar: shard is missing"),
        (_cut_to(lambda size: size - 1024), "shard-00001.tar: .* bytes, the index says"),
        (_cut_to(lambda size: 700), r"shard-00001.tar: 700 bytes, .* from offset 700"),
        (_cut_to(lambda size: size // 2), "shard-00001.tar: .* bytes, the index says"),
        (_swap, "shard-0000[01].tar: .* bytes, the index says"),
        (_add, "shard-99999.tar: extra shard"),
    ],
)
def test_structural_damage_is_found_at_opening(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / "shard-00001.tar")
    with pytest.raises(DataError, match=message):
        open_corpus(copy)
    assert any(line.startswith(str(copy)) for line in verify_shards.corpus_problems(copy))


def _flip(path: Path, offset: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[offset] ^= 0x10
    path.write_bytes(payload)


@pytest.mark.parametrize("name", ["tokens", "lengths"])
def test_flipped_payload_is_found_at_reading_and_by_verify(copy: Path, name: str) -> None:
    members = MemberTable.from_file(copy / MEMBERS_FILE, open_corpus(copy).index.members_sha256)
    row = int(np.searchsorted(members.shard, 1))
    offset = int(getattr(members, f"{name}_offset")[row])
    _flip(copy / "shard-00001.tar", offset + 3)
    with pytest.raises(DataError, match=rf"shard-00001.tar: {name} at byte offset {offset} "):  # noqa: PT012
        corpus = open_corpus(copy)
        first = np.array([corpus.index.shards[0].tokens])
        found = corpus.reader.read(first, np.array([10]), np.zeros(10, corpus.reader.dtype), np.array([0]))
        raise DataError(found[0])
    problems = list(verify_shards.corpus_problems(copy))
    assert len(problems) == 1
    assert f"shard-00001.tar: offset {offset}: " in problems[0]


def test_swapped_shards_of_equal_size_are_found(tmp_path: Path) -> None:
    """The sizes say nothing here: the payloads do, at reading and at verifying."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer", "byte_bpe"))
    tokenizer.save(tmp_path)
    writer, counts = ShardWriter(tmp_path, "uint16", 1), CorpusCounts(tokenizer.vocab_size)
    for seed in range(2):
        document = np.random.default_rng(seed).integers(5, 600, 1000)
        writer.add(document)
        counts.add([document])
    shards, members = writer.close()
    write_index(tmp_path, counts, tokenizer, "uint16", shards, members, "recipe")
    assert list(verify_shards.corpus_problems(tmp_path)) == []
    _swap(tmp_path / "shard-00001.tar")
    corpus = open_corpus(tmp_path)
    with pytest.raises(DataError, match=r"shard-00001.tar: tokens at byte offset 512 "):
        corpus.tokens_at(1000, 1)
    for number, problem in enumerate(verify_shards.corpus_problems(tmp_path)):
        assert problem.startswith(f"{tmp_path}/shard-0000{number}.tar: offset 512: ")
    assert number == 1


def test_flipped_header_is_found_by_verify(copy: Path) -> None:
    _flip(copy / "shard-00000.tar", 3)
    (problem,) = verify_shards.corpus_problems(copy)
    assert "shard-00000.tar: offset 0: tar header damaged" in problem


def test_change_between_members_is_found_by_verify(copy: Path) -> None:
    path = copy / "shard-00000.tar"
    _flip(path, path.stat().st_size - 1)
    (problem,) = verify_shards.corpus_problems(copy)
    assert "shard-00000.tar: sha256 differs" in problem


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            INDEX_FILE,
            b'"version": 2',
            b'"version": 9',
            "version 9, this program reads version 2; write",
        ),
        (INDEX_FILE, b'"shards": [', b'"shards": [[', "damaged index"),
        (INDEX_FILE, b'"dtype": "uint16"', b'"dtype": "uint32"', "changed by hand or damaged"),
        (INDEX_FILE, b'"recipe"', b'"recipes"', "damaged index"),
        (MEMBERS_FILE, b"NUMPY", b"NUMPX", "sha256 differs"),
        ("tokenizer.json", b"{", b" {", "not the tokenizer of these shards"),
    ],
)
def test_damaged_side_files_are_found(copy: Path, file: str, old: bytes, new: bytes, message: str) -> None:
    path = copy / file
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        open_corpus(copy).tokenizer()


def test_ids_above_the_vocabulary_are_found_by_verify(copy: Path) -> None:
    index = open_corpus(copy).index
    smaller = dataclasses.replace(index.tokenizer, vocab_size=300)
    (copy / INDEX_FILE).write_text(dataclasses.replace(index, tokenizer=smaller).to_json(), encoding="utf-8")
    problems = list(verify_shards.corpus_problems(copy))
    assert problems
    assert "vocabulary of 300" in problems[0]
