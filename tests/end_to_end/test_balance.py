"""`cpu_tiny_moe.json`: router biases balance the experts on real text within its 300 steps, and the report shows it."""

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from evals.__main__ import main
from evals.runs import read_run
from neomoba_dist.config import load_config
from tests.ranks import run_ranks
from tests.runs import train_here

ROOT = Path(__file__).resolve().parents[2]


def make_corpus(folder: Path) -> None:
    """The standard library's text as `make quickstart` and `make bench` prepare it."""
    text, tokenizer = folder / "text", folder / "tokenizer"
    commands: list[list[str | Path]] = [
        ["data_tools.sample_corpus", "--output", text],
        ["data_tools.train_tokenizer", "--input", text / "train", "--output", tokenizer, "--vocab_size", "8192"],
    ]
    for part in ("train", "validation"):
        words = ["--input", text / part, "--tokenizer", tokenizer, "--output", folder / part]
        commands.append(["data_tools.tokenize_corpus", *words])
    for command in commands:
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_biases_balance_within_300_steps(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    data = [f"neomoba.data.{part}={tmp_path / 'corpus' / part}" for part in ("train", "validation")]
    config = load_config(ROOT / "ds_configs" / "cpu_tiny_moe.json", data)
    run_ranks(1, train_here, config, tmp_path / "run", 300, timeout=1500)
    run = read_run(tmp_path / "run")
    worst = [max(entry["max_violation"]) for entry in run.steps]  # single updates, as logged; of the worst layer
    assert len(worst) == 300
    assert mean(worst[-20:]) < 0.5
    assert max(worst[20:60]) > 1, "it was not balanced from the start"
    assert main(["report", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "<h2>Experts</h2>" in (tmp_path / "report.html").read_text()
