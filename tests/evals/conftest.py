"""One corpus and one run folder for each objective, made once."""

from pathlib import Path

import pytest

from evals.load import Subject, load_subject
from neomoba_dist.data.corpus import Corpus
from tests.corpora import make_corpus
from tests.evals.runs import EXPERTS, make_config, write_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), "wordpiece")


@pytest.fixture(scope="session")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Objective -> run folder."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_run(folder / kind, make_config(corpus.folder, objective=kind)) for kind in ("mlm", "clm")}


@pytest.fixture(scope="session")
def moe_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a causal model with experts."""
    return write_run(tmp_path_factory.mktemp("moe"), make_config(corpus.folder, objective="clm", **EXPERTS))


@pytest.fixture(scope="session")
def subjects(runs: dict[str, Path]) -> dict[str, Subject]:
    """Objective -> loaded checkpoint."""
    return {kind: load_subject(folder, None, "cpu") for kind, folder in runs.items()}
