"""`python -m evals bench checkpoint`: what it counts is right; its seconds are there."""

import json
from pathlib import Path

import pytest

from evals.__main__ import main

MIB = 2**20


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "1,2", "--layers", "4", "--repetitions", "1", "--directory", str(tmp_path)]
    assert main(["bench", "checkpoint", *arguments, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "checkpoint.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[0]["share"] == pytest.approx(2 * rows[1]["share"], rel=1e-3)
    for row in rows:
        assert row["bytes"] == pytest.approx(12 * row["parameters"], rel=1e-2)
        assert row["peak"]["save"] <= 64 * MIB  # the bounds
        assert row["peak"]["async"] <= row["share"] + 64 * MIB
        assert all(value > 0 for value in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
