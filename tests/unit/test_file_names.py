"""A name in an index is a file name, never a path: shards, tokenizers, cached files, parts of text, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools import clean, index, verify_shards
from data_tools.foreign import TextIndex
from data_tools.sources import input_files
from neomoba_dist.checkpoint.layout import FORMAT, CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config.paths import is_file_name
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import CorpusIndex
from tests.corpora import make_corpus

PATHS = ["/etc/passwd", "../../x.tar", "..", ".", "", "sub/shard-00000.tar", "a\\b", "a\0b", "a\nb"]
OTHER_NAMES = [7, None, ["shard-00000.tar"]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def rewrite(folder: Path, place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """index.json with another value; the fingerprint is made to fit, as whoever means harm would."""
    raw = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    *parents, last = place
    block = raw
    for name in parents:
        block = block[name]
    block[last] = value
    (folder / "index.json").write_text(json.dumps(raw), encoding="utf-8")
    return raw


@pytest.mark.parametrize(
    "name", ["shard-00000.tar", "tokenizer.json", "model.pp0-tp0.safetensors", "\u00e9.tar", "..a"]
)
def test_file_names(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("name", [*PATHS, *OTHER_NAMES])
def test_paths_are_no_file_names(name: Any) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("place", [("shards", 0, "file"), ("tokenizer", "file")])
def test_a_corpus_opens_no_path(tmp_path: Path, corpus: Corpus, place: tuple[str | int, ...], name: str) -> None:
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    shutil.copy(corpus.folder / corpus.index.shards[0].file, tmp_path / "x.tar")
    rewrite(folder, place, name)
    for opened in (open_corpus, lambda path: list(verify_shards.corpus_problems(path))):
        with pytest.raises(
            DataError, match=r"index.json: names .*, which is no plain file name; do not use this index"
        ):
            opened(folder)


@pytest.mark.parametrize(
    "place", [("shards", 0, "sha256"), ("tokenizer", "sha256"), ("members_sha256",), ("documents_sha256",)]
)
def test_a_digest_is_no_path_into_the_cache(tmp_path: Path, corpus: Corpus, place: tuple[str | int, ...]) -> None:
    """The cache names files by the digest that the index gives."""
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    rewrite(folder, place, "../../../../tmp/x")
    with pytest.raises(DataError, match="is no sha256; do not use this index"):
        open_corpus(f"file://{folder}", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_raw_text_shards(tmp_path: Path, corpus: Corpus) -> None:
    shard = corpus.index.shards[0]
    entry = {"file": "../x.tar", "bytes": 1, "sha256": shard.sha256, "documents": 1}
    head = {"format": "neomoba-text-shards", "version": 1, "suffix": "txt", "documents": 1, "text_bytes": 1}
    raw = head | {"members_sha256": shard.sha256, "shards": [entry]}
    (tmp_path / "index.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(DataError, match=r"names '../x.tar', which is no plain file name"):
        TextIndex.from_file(tmp_path / "index.json")
    with pytest.raises(DataError, match="no plain file name"):
        input_files([tmp_path])


def test_parts_of_text(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text", encoding="utf-8")
    arguments = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out")]
    clean.main(arguments)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    manifest["parts"][0]["file"] = str(tmp_path / "in.txt")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"manifest.json: names .*in.txt', which is no plain file name; add --overwrite"
    ):
        clean.main(arguments)


@pytest.mark.parametrize("name", PATHS)
def test_a_checkpoint_opens_no_path(tmp_path: Path, name: str) -> None:
    piece = {"file": name, "key": "k", "offset": [0], "shape": [1]}
    tensors = {"model.x": {"shape": [1], "dtype": "float32", "pieces": [piece]}}
    raw = {"format": FORMAT, "version": 1, "step": 1, "config": {}, "tensors": tensors}
    (tmp_path / "index.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index.json: model.x lies in .*, which is no plain file name"):
        CheckpointReader(tmp_path)


def test_a_corpus_that_names_files_is_read(corpus: Corpus) -> None:
    assert CorpusIndex.from_file(corpus.folder / "index.json") == corpus.index
    index.check_existing(corpus.folder, None)
