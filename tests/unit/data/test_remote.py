"""Corpora elsewhere: over http, a pipe and fsspec; the cache; what is wrong is said before the first step."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.data import remote
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.remote import RemoteFolder
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream


class _Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def served(corpus: Corpus, tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(url, the folder behind it, the paths that were fetched)."""
    folder = Path(shutil.copytree(corpus.folder, tmp_path / "remote"))
    handler = type("Handler", (_Handler,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.001)


def _batches(corpus: Corpus, count: int = 6) -> list[torch.Tensor]:
    settings = DataConfig(train="", cache=None, prefetch=0)
    shape: dict[str, Any] = {"sequence_length": 256, "micro_batch_size": 4, "accumulation": 2}
    stream = UpdateStream([Source(corpus)], settings, objective="mlm", seed=3, **shape)
    return [batch.input_ids for batches, _ in islice(stream, count) for batch in batches]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["http", "pipe", "fsspec"])
def test_the_same_batches_as_from_the_folder(
    corpus: Corpus, served: tuple[str, Path, list[str]], tmp_path: Path, kind: str
) -> None:
    url, folder, asked = served
    place = {"http": url, "pipe": f"pipe:cat {folder}/{{}}", "fsspec": "memory://bucket/corpus"}[kind]
    if kind == "fsspec":
        memory = fsspec.filesystem("memory")
        for path in folder.iterdir():
            memory.pipe(f"/bucket/corpus/{path.name}", path.read_bytes())
    opened = open_corpus(place, cache=tmp_path / "cache")
    assert opened.fingerprint == corpus.fingerprint
    assert not list((tmp_path / "cache" / "files").glob("*.tar"))  # shards come when they are read
    assert _equal(_batches(opened), _batches(corpus))
    assert opened.tokenizer().sha256 == corpus.tokenizer().sha256
    cached = sorted(path.name for path in (tmp_path / "cache" / "files").iterdir() if not path.name.startswith("."))
    assert [name for name in cached if name.endswith(".tar")]
    # the next run fetches the index and nothing else
    asked.clear()
    assert _equal(_batches(open_corpus(place, cache=tmp_path / "cache")), _batches(corpus))
    assert asked == (["/index.json"] if kind == "http" else [])


def test_ranks_of_a_machine_fetch_a_file_once(
    corpus: Corpus, served: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    url, _, asked = served
    entry = corpus.index.shards[0]
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: RemoteFolder(url, tmp_path).path(entry.file, entry.sha256), range(6)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == (corpus.folder / entry.file).read_bytes()
    assert asked == [f"/{entry.file}"]


def test_structural_damage_is_found_before_the_first_step(served: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    url, folder, _ = served
    shard = folder / "shard-00001.tar"
    payload = shard.read_bytes()
    shard.write_bytes(payload[:-1024])
    with pytest.raises(DataError, match=rf"{url}/shard-00001.tar: \d+ bytes, the index says {len(payload)}"):
        open_corpus(url, cache=tmp_path / "cache")
    shard.unlink()
    with pytest.raises(DataError, match=rf"{url}/shard-00001.tar: cannot be fetched \(.*404"):
        open_corpus(url, cache=tmp_path / "cache")
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"neomoba.data.train: .*/index.json: cannot be fetched"):
        open_corpus(url, cache=tmp_path / "cache")


def test_a_damaged_file_never_enters_the_cache(
    served: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder, asked = served
    shard = folder / "shard-00000.tar"
    payload = bytearray(shard.read_bytes())
    payload[5000] ^= 1
    shard.write_bytes(payload)
    opened = open_corpus(url, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"shard-00000.tar: \d+ bytes whose sha256 is not that of the index"):
        opened.tokens_at(0, 10)
    assert asked.count("/shard-00000.tar") == remote.ATTEMPTS
    assert not list((tmp_path / "cache" / "files").glob("*shard-00000.tar"))
    # a cut transfer is tried again
    payload[5000] ^= 1
    shard.write_bytes(payload)
    whole, calls = remote._pieces, []

    def cut_once(place: str) -> Iterator[bytes]:
        calls.append(place)
        yield b"".join(whole(place))[: 1000 if len(calls) == 1 else None]

    monkeypatch.setattr(remote, "_pieces", cut_once)
    assert len(opened.tokens_at(0, 10)) == 10
    assert len(calls) == 2


def test_what_cannot_work_is_said_in_one_line(tmp_path: Path) -> None:
    for place, message in (
        ("http://127.0.0.1:9/corpus", r"neomoba.data.train: http://127.0.0.1:9/corpus/index.json: cannot be fetched"),
        ("pipe:cat somewhere", r"write \{\} where the command takes the name"),
        ("pipe:cat /nowhere/{}", r"ended with exit code 1"),
        ("gopher://bucket/corpus", r"gopher://bucket/corpus/index.json: cannot be read here"),
        ("memory://nothing/here", r"memory://nothing/here/index.json: cannot be fetched"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_corpus(place, cache=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"needs a cache; set neomoba.data.cache"):
        open_corpus("s3://bucket/corpus")
