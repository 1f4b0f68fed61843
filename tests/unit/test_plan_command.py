"""launch/plan.py: a table or JSON within seconds, one line on a mistake, a file that loads."""

import json
from pathlib import Path

import pytest

from neomoba_dist.config import load_config
from tests.programs import run_program

PHASE3 = ("launch/plan.py", "--ds_config", "ds_configs/phase3.json")


def test_it_proposes_and_writes(tmp_path: Path) -> None:
    written = tmp_path / "best.json"
    result = run_program(*PHASE3, "--gpus", "8", "--list", "2", "--json", "--write", str(written))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["layouts"]) == ["as given", "1.", "2."]
    config, best = load_config(written), found["layouts"]["1."]
    assert config.plan(8).micro_batch_size == best["batch"]["micro_batch_size"]
    assert config.phase.recompute == best["recompute"]
    assert config.data == load_config("ds_configs/phase3.json").data


def test_the_table_says_why_not() -> None:
    result = run_program(*PHASE3, "--gpus", "8", "--gpu_memory", "5", "--build", "--list", "1")
    assert result.returncode == 0, result.stderr
    assert "the layout as given needs" in result.stdout
    assert "built 1 kinds of rank of 8" in result.stdout
    assert "\n1. " in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "0"), "--gpus is 0; give more than 0"),
        (("--gpus", "8", "--reserve", "1"), "--reserve is 1.0"),
        (("--gpus", "8", "--gpu_memory", "1"), "no layout on 8 GPUs fits; the layout as given needs"),
        (("--gpus", "8", "--set", "neomoba.phase.recompute=some"), "neomoba.phase.recompute"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str) -> None:
    result = run_program(*PHASE3, *words)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
