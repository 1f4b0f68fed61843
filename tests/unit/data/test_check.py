"""Start-up checks: each shard looked at once in the whole job and remembered; few files open, however many shards."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus_index import CorpusCounts, write_index
from neomoba_dist.config import DataConfig
from neomoba_dist.data.check import check_corpora, open_corpus
from neomoba_dist.data.corpus import Corpus, read_corpus
from neomoba_dist.data.errors import AgreedError, DataError
from neomoba_dist.data.rows import Source
from neomoba_dist.data.shards import ShardWriter
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_corpus, make_tokenizer
from tests.jobs import run_job

_watched: list[tuple[str, str]] | None = None


def _listen(event: str, arguments: tuple) -> None:
    if _watched is not None and event in ("open", "os.scandir", "os.listdir"):
        _watched.append((event, str(arguments[0])))


sys.addaudithook(_listen)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), shard_bytes=20_000)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(kind, path) of what this process asks of the file system."""
    global _watched
    stat = os.stat
    _watched = found = []

    def watched(path: object, *arguments: object, **options: object) -> os.stat_result:
        found.append(("stat", str(path)))
        return stat(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", watched)
    yield found
    _watched = None


def _stream(corpus: Corpus, cache: Path, **options: object) -> UpdateStream:
    settings = DataConfig(train="", cache=str(cache), prefetch=0)
    layout: dict = {"objective": "mlm", "sequence_length": 256, "micro_batch_size": 2, "accumulation": 2, "seed": 1}
    return UpdateStream([Source(corpus)], settings, **layout | options)


def test_four_ranks_ask_for_each_shard_once(copy: Path, tmp_path: Path, requests: list[tuple[str, str]]) -> None:
    shards = len(list(copy.glob("*.tar")))
    assert shards > 4
    cache = tmp_path / "cache"

    def start(job: object) -> None:
        corpus = read_corpus(copy)
        check_corpora([corpus], cache, job)  # type: ignore[arg-type]
        _stream(corpus, cache, job=job)

    def count() -> Counter:
        requests.clear()
        assert run_job(4, start) == [None] * 4
        return Counter((kind, Path(path).suffix == ".tar") for kind, path in requests if str(copy) in path)

    first = count()
    assert first["open", True] == shards
    assert shards <= first["stat", True] <= 2 * shards
    again = count()  # nothing changed: nothing is opened
    assert again["open", True] == 0
    assert again["stat", True] == shards
    everything = sum(again.values()) - shards
    assert everything <= 4 * 6  # a few files of the corpus as a whole, from each rank
    os.utime(copy / "shard-00002.tar")
    assert count()["open", True] == 1
    assert count()["open", True] == 0


def test_every_rank_learns_what_one_of_them_finds(copy: Path, tmp_path: Path) -> None:
    path = copy / "shard-00003.tar"
    payload = path.read_bytes()
    path.write_bytes(payload[:-512])
    found = run_job(4, lambda job: check_corpora([read_corpus(copy)], tmp_path, job))
    assert all(isinstance(error, AgreedError) for error in found)
    assert {str(error) for error in found} == {
        f"{path}: {len(payload) - 512} bytes, the index says {len(payload)} (differs from offset {len(payload) - 512} "
        "on); restore the file or run data_tools.tokenize_corpus with --overwrite"
    }
    path.write_bytes(payload)
    assert run_job(4, lambda job: check_corpora([read_corpus(copy)], tmp_path, job)) == [None] * 4


def test_what_changed_since_the_last_look_is_looked_at(copy: Path, tmp_path: Path) -> None:
    open_corpus(copy, cache=tmp_path)
    first, second = copy / "shard-00000.tar", copy / "shard-00001.tar"
    payload = bytearray(second.read_bytes())
    payload[512 * (payload.index(b".len") // 512 + 1)] ^= 1  # the first member's lengths: the size stays
    second.write_bytes(payload)
    with pytest.raises(DataError, match=r"shard-00001.tar: lengths at byte offset \d+"):
        open_corpus(copy, cache=tmp_path)
    first.unlink()
    with pytest.raises(DataError, match=r"shard-00000.tar: shard is missing"):
        open_corpus(copy, cache=tmp_path)


def _tiny_shards(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = load_tokenizer(make_tokenizer(folder, "byte_bpe"))
    tokenizer.save(folder)
    writer, counts = ShardWriter(folder, "uint16", 1), CorpusCounts(tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    with monkeypatch.context() as quick:
        quick.setattr(os, "fsync", lambda file: None)
        for _ in range(count):
            document = rng.integers(300, 600, 256)
            writer.add(document)
            counts.add([document])
        shards, members = writer.close()
        write_index(folder, counts, tokenizer, "uint16", shards, members, "recipe")
    return folder


def _read_on_few_files(folder: Path, cache: Path, shards: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    code = 1
    try:
        corpus = open_corpus(folder, cache=cache)
        stream = _stream(corpus, cache, micro_batch_size=100, accumulation=10)
        rows = [
            row for batches, _ in islice(stream, shards // 1000) for batch in batches for row in batch.row_ids.tolist()
        ]
        assert sorted(rows) == list(range(shards))
        assert len(os.listdir("/proc/self/fd")) < 128 + threading.active_count()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("shards", [1000, pytest.param(10_000, marks=pytest.mark.full)])
def test_many_shards_on_256_open_files(tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _tiny_shards(tmp_path / "shards", shards, monkeypatch)
    arguments = (folder, tmp_path / "cache", shards)
    process = multiprocessing.get_context("fork").Process(target=_read_on_few_files, args=arguments)
    process.start()
    process.join(100)
    assert process.exitcode == 0
