"""The corpus that the tests of this folder read, and a copy of it to damage."""

import shutil
from pathlib import Path

import pytest

from neomoba_dist.data.corpus import Corpus
from tests.corpora import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def copy(corpus: Corpus, tmp_path: Path) -> Path:
    """A folder of shards that a test may damage."""
    return Path(shutil.copytree(corpus.folder, tmp_path / "shards"))
