"""The memory of the ranks is that of all children of a launcher together, and failures are told."""

import subprocess
import sys
from pathlib import Path

import pytest

import evals.__main__ as program
from evals.bench.long import watch
from neomoba_dist.errors import FAILED

MIB = 2**20
HOLD = "import time; held = bytearray(64 << 20); time.sleep(1.5)"
LAUNCH = f"""
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", {HOLD!r}]) for _ in range(2)]
for child in children: child.wait()
"""


def test_children_are_added_up() -> None:
    process = subprocess.Popen([sys.executable, "-c", LAUNCH])
    peak = watch(process)
    assert process.returncode == 0
    assert len(peak) == 2
    assert all(64 * MIB < held < 110 * MIB for held in peak)


def test_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    works = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: works([sys.executable, "-c", "raise SystemExit(3)"]))
    words = ["bench", "long", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    assert program.main(words) == FAILED
    assert "bench long: the evaluation failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
