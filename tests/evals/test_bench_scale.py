"""`python -m evals bench scale`: generated corpora are corpora, and a rank of many has its own share of everything."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals.__main__ import main
from evals.bench._scale_corpus import lengths_of, make_corpus
from neomoba_dist.data.check import open_corpus
from neomoba_dist.errors import MISTAKE


def test_a_generated_corpus_reads_like_any_other(tmp_path: Path) -> None:
    make_corpus(tmp_path, 150_000)
    corpus = open_corpus(tmp_path)
    assert len(corpus.index.shards) == 2
    lengths = np.concatenate([lengths_of(0, 100_000), lengths_of(1, 50_000)])
    assert np.array_equal(corpus.lengths(0, 150_000), lengths)
    assert corpus.tokens == lengths.sum()
    border = corpus.index.shards[0].tokens
    assert not corpus.tokens_at(border - 100, 200).any()
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert used < 20e6 < 2 * corpus.tokens / 10


def test_a_rank_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "512", "--models", "250m", "--documents", "20000,40000", "--directory", str(tmp_path)]
    assert main(["bench", "scale", *words, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert [row["documents"] for row in found["corpora"]] == [20000, 40000]
    assert set(found["growth"]) == {"corpus", "plan", "first batch"}
    (row,) = found["ranks"]
    assert row["save"]["bytes"] == pytest.approx(12 * 258_507_776 / 512, rel=0.01)
    share = 4 * 258_507_776
    assert share <= row["weights"]["after"] - row["weights"]["before"] + (64 << 20)
    assert row["weights"]["peak"] - row["weights"]["before"] < share + (64 << 20)
    assert (tmp_path / "out" / "scale.png").stat().st_size > 10_000
    assert "documents^" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "8b"), "--models 8b: no such model; choose from: 250m, 1b, 7b, 70b"),
        (("--documents", "1000"), "--documents 1000: too few for one update of 16M tokens; give at least 20000"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", *words]) == MISTAKE
    assert message in capsys.readouterr().err
