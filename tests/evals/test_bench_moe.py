"""`python -m evals bench moe`: its figures belong together; refusals."""

import json
from pathlib import Path

import pytest

from evals.__main__ import main
from neomoba_dist.errors import MISTAKE

SMALL = ["--tokens", "64", "--hidden", "24", "--width", "16", "--repetitions", "1", "--device", "cpu"]


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe", *SMALL, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "moe.json").read_text())
    assert result["ratio"] == pytest.approx(result["moe_seconds"] / result["dense_seconds"])
    assert result["goal"] == 1.25
    assert f"{result['ratio']:.3f}" in capsys.readouterr().out


def test_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe", *SMALL, "--top-k", "9"]) == MISTAKE
    assert capsys.readouterr().err == "error: --top-k 9 is larger than --experts 8; lower it\n"
