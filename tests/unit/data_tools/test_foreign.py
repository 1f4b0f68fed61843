"""WebDataset shards made elsewhere: read in place or tokenised, and every damage refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools import index, tokenize_corpus, verify_shards
from data_tools.cleaning import CleaningReport
from data_tools.sources import input_files, read_documents
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import INDEX_FILE, MEMBERS_FILE, MemberTable
from tests.corpora import folder_digests, make_corpus, make_tokenizer


def texts_in(folder: Path) -> list[str]:
    return [document.text for document in read_documents(input_files([folder]), CleaningReport())]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "byte_bpe")


@pytest.mark.parametrize("suffix", ["u16", "u32", "i64", "npy"])
def test_foreign_shards_of_ids_are_read_in_place(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 600, n) for n in (3, 2000, 1, 700, 40, 9000)]
    dtype = {"u16": "<u2", "u32": "<u4", "i64": "<i8", "npy": "<i4"}[suffix]
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"part-{number}.tar")) as writer:
            for i, ids in enumerate(documents[3 * number : 3 * number + 3]):
                array = ids.astype(dtype)
                # the peer's own writer, with its extended headers
                payload = array if suffix == "npy" else array.tobytes()
                writer.write({"__key__": f"d{i}", suffix: payload, "json": {"url": "u"}})
    before = {name: digest for name, digest in folder_digests(tmp_path).items() if name.endswith(".tar")}
    arguments = [str(tmp_path), "--tokenizer", str(tokenizer)]
    with pytest.raises(DataError, match="give --suffix: one of"):
        index.main(arguments)
    index.main([*arguments, "--suffix", suffix])
    corpus = open_corpus(tmp_path)
    assert corpus.index.subsets[0][:2] == [1024, 2]
    assert corpus.document_lengths.tolist() == [len(ids) for ids in documents]
    assert corpus.tokens_at(0, corpus.tokens).tolist() == np.concatenate(documents).tolist()
    assert list(verify_shards.corpus_problems(tmp_path)) == []
    assert {name: digest for name, digest in folder_digests(tmp_path).items() if name.endswith(".tar")} == before
    whole = folder_digests(tmp_path)
    index.main(arguments)
    assert folder_digests(tmp_path) == whole

    payload = bytearray((tmp_path / "part-1.tar").read_bytes())
    members = MemberTable.from_file(tmp_path / MEMBERS_FILE, corpus.index.members_sha256)
    place = int(members.tokens_offset[4])
    payload[place + 1] ^= 4
    (tmp_path / "part-1.tar").write_bytes(payload)
    (problem,) = verify_shards.corpus_problems(tmp_path)
    assert f"part-1.tar: offset {place}: " in problem
    with pytest.raises(DataError, match=rf"part-1.tar: tokens at byte offset {place} "):
        open_corpus(tmp_path).tokens_at(corpus.index.shards[0].tokens + 700, 1)


def test_lost_index_is_made_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    tables = folder_digests(corpus.folder)
    (corpus.folder / INDEX_FILE).unlink()
    index.main([str(corpus.folder), "--tokenizer", str(corpus.folder)])
    again = open_corpus(corpus.folder)
    assert again.fingerprint == corpus.fingerprint
    assert {k: v for k, v in folder_digests(corpus.folder).items() if k != INDEX_FILE} == {
        k: v for k, v in tables.items() if k != INDEX_FILE
    }
    assert again.index.length_histogram == corpus.index.length_histogram
    assert again.unigram_entropy == corpus.unigram_entropy


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_foreign_shards_of_text_are_tokenised(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    texts = [f"document {i} " + "word " * i for i in range(6)]
    for number in range(2):
        with webdataset.TarWriter(str(shards / f"{number}.tar")) as writer:
            for i, text in enumerate(texts[3 * number : 3 * number + 3]):
                writer.write({"__key__": f"d{i}", suffix: text if suffix == "txt" else {"content": text}})
    with pytest.raises(DataError, match=r"needs an index: python -m data_tools\.index"):
        input_files([shards])
    index.main([str(shards)])
    assert texts_in(shards) == texts
    assert list(verify_shards.corpus_problems(shards)) == []
    with pytest.raises(DataError, match=r"not of token shards; make them with: .*tokenize_corpus --input"):
        open_corpus(shards)
    common = ["--tokenizer", str(tokenizer), "--workers", "1", "--output"]
    tokenize_corpus.main([*common, str(tmp_path / "corpus"), "--input", str(shards)])
    assert open_corpus(tmp_path / "corpus").documents == 6
    before = folder_digests(shards)
    with pytest.raises(DataError, match="holds tar files of another origin; change --output"):
        tokenize_corpus.main([*common, str(shards), "--input", str(shards), "--overwrite"])
    assert folder_digests(shards) == before

    payload = (shards / "1.tar").read_bytes()
    damaged = payload.replace(b"document 4", b"document 9")
    (shards / "1.tar").write_bytes(damaged)
    place = damaged.index(b"document 9") - (0 if suffix == "txt" else len('{"content": "'))
    with pytest.raises(DataError, match=rf"1.tar: text at byte offset {place} .* fails its crc32"):
        texts_in(shards)
    assert len(list(verify_shards.corpus_problems(shards))) == 1
    (shards / "1.tar").write_bytes(payload[:2048])
    with pytest.raises(DataError, match=r"1.tar: 2048 bytes, the index says"):
        texts_in(shards)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (8 * 512, "no end of archive at offset 4096"),
        (8 * 512 + 100, "no end of archive at offset 4096"),
        (6 * 512, "cut inside 1.u16 at offset 2560"),
        (0, "empty file"),
    ],
)
def test_cut_foreign_shards_are_refused(tmp_path: Path, tokenizer: Path, size: int, message: str) -> None:
    shard = write_tar(tmp_path / "a.tar", {f"{i}.u16": b"\1\0" * 600 for i in range(4)})
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"a.tar: .*({message})"):
        index.main([str(tmp_path), "--tokenizer", str(tokenizer), "--suffix", "u16"])
    assert not (tmp_path / INDEX_FILE).exists()


def test_damaged_header_of_a_foreign_shard_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {f"{i}.u16": b"\1\0" * 100 for i in range(4)})
    payload = bytearray(shard.read_bytes())
    payload[2 * 1024 + 3] ^= 1
    shard.write_bytes(payload)
    with pytest.raises(DataError, match=r"a.tar: damaged header or no end of archive at offset 2048"):
        index.main([str(tmp_path), "--tokenizer", str(tokenizer)])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.u16": b"\1\0\1"}, "3 bytes are no whole number of uint16"),
        ({"a.u16": b"\xff\xff"}, r"a.tar: ids from 65535 to 65535, the tokenizer has \d+; give --tokenizer"),
        ({"a.npy": b"rubbish"}, "not an .npy file"),
        ({"a.u16": b"\1\0", "a.len": b"\2\0\0\0"}, ".len does not add up"),
        ({"a.u16": b"\1\0", "a.len": b"\xff\xff\xff\xff"}, "last document goes on in no other member"),
        ({"a.u16": b""}, "hold no id"),
        ({"a.png": b""}, "give --suffix: one of .* has png"),
    ],
)
def test_foreign_ids_that_cannot_be(tmp_path: Path, tokenizer: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        index.main([str(tmp_path), "--tokenizer", str(tokenizer)])
    assert not (tmp_path / INDEX_FILE).exists()


def test_an_index_that_does_not_fit_is_not_kept_silently(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.u16": b"\x09\0"})
    index.main([str(tmp_path), "--tokenizer", str(tokenizer)])
    other = make_tokenizer(tmp_path / "other", "byte_bpe", vocab_size=600)
    with pytest.raises(DataError, match="of another tokenizer; add --overwrite"):
        index.main([str(tmp_path), "--tokenizer", str(other)])
    write_tar(tmp_path / "b.tar", {"b.u16": b"\2\0"})
    with pytest.raises(DataError, match=r"b.tar: extra shard.*add --overwrite"):
        index.main([str(tmp_path), "--tokenizer", str(tokenizer)])
    write_tar(tmp_path / "c.tar", {"c.u16": b"\xff\xff"})
    before = folder_digests(tmp_path)
    with pytest.raises(DataError, match="ids from 65535 to 65535"):
        index.main([str(tmp_path), "--tokenizer", str(tokenizer), "--overwrite"])
    assert folder_digests(tmp_path) == before, "a refused run replaces nothing"
    (tmp_path / "c.tar").unlink()
    index.main([str(tmp_path), "--tokenizer", str(tokenizer), "--overwrite"])
    assert open_corpus(tmp_path).tokens == 2


def test_foreign_shards_of_ids_are_not_replaced(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", {"a.u16": b"\x09\0"})
    index.main([str(tmp_path / "shards"), "--tokenizer", str(tokenizer)])
    (tmp_path / "text.txt").write_text("import os", encoding="utf-8")
    common = ["--input", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer), "--workers", "1", "--output"]
    before = folder_digests(tmp_path / "shards")
    with pytest.raises(DataError, match="holds tar files of another origin; change --output"):
        tokenize_corpus.main([*common, str(tmp_path / "shards"), "--overwrite"])
    assert folder_digests(tmp_path / "shards") == before


def test_ids_need_their_tokenizer(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.u16": b"\1\0"})
    with pytest.raises(DataError, match=r"holds ids \(.u16\); add --tokenizer"):
        index.main([str(tmp_path)])
    with pytest.raises(DataError, match=r"no \*.tar in this folder"):
        index.main([str(tmp_path / "none")])
