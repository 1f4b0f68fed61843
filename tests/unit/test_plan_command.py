"""launch/plan.py: a table or JSON within seconds, one line on a mistake, a file that loads."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from neomoba_dist.config import load_config
from tests.programs import ROOT, run_program

CLUSTER = ROOT / "ds_configs" / "cluster"
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
    wide = "zero_optimization.reduce_bucket_size=500000000"
    result = run_program(*PHASE3, "--set", wide, "--gpus", "8", "--gpu_memory", "5", "--build", "--list", "1")
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


def cluster_files(phase: str, gpus: int) -> tuple[Path, Path]:
    """The JSON that `make cluster-configs` wrote, and what the planner said."""
    return CLUSTER / f"{phase}_{gpus}.json", CLUSTER / f"{phase}_{gpus}.txt"


ALL = [(phase, gpus) for phase in ("phase1", "phase2", "phase3") for gpus in (1, 8, 64, 256)]


@pytest.mark.parametrize(("phase", "gpus"), ALL)
def test_a_cluster_file_is_its_phase_but_for_the_layout(phase: str, gpus: int) -> None:
    file, said = cluster_files(phase, gpus)
    config, shipped = load_config(file), load_config(f"ds_configs/{phase}.json")
    plan = config.plan(gpus)
    assert plan.tokens_per_update == shipped.phase.tokens_per_update
    assert replace(config.phase, recompute=shipped.phase.recompute) == shipped.phase
    for block in ("model", "data", "checkpoint", "log"):
        assert getattr(config, block) == getattr(shipped, block)
    first = next(line for line in said.read_text().splitlines() if line.startswith("1. "))
    batch = f"micro-batch {plan.micro_batch_size} x {plan.gradient_accumulation_steps}"
    assert f" ZeRO-{config.zero_stage} {batch} recompute {config.phase.recompute} " in first


def test_cluster_files_are_all_there() -> None:
    assert {path for pair in ALL for path in cluster_files(*pair)} == set(CLUSTER.iterdir())


def cells(line: str) -> tuple[str, str]:
    """Of a line of the planner's table the layout, and GiB and seconds of a step as docs/planner.md has them."""
    found = re.match(r"(?:as given|1\.) +(.* recompute \w+) +([\d. ]+)", line)
    assert found
    numbers = found[2].split()
    return found[1], f"{float(numbers[5]):.1f}, {numbers[6]}"


def test_the_table_of_the_docs_is_that_of_the_files() -> None:
    rows = []
    for phase, gpus in ALL:
        lines = [line for line in cluster_files(phase, gpus)[1].read_text().splitlines() if " recompute " in line]
        given = cells(lines[0])[1] if lines[0].startswith("as given") else "refused"
        first = next(line for line in lines if line.startswith("1. "))
        rows.append(f"| {phase[-1]} | {gpus} | {given} | {' | '.join(cells(first))} |")
    assert "\n".join(rows) in (ROOT / "docs/planner.md").read_text()


@pytest.mark.parametrize(
    ("phase", "gpus"), [pytest.param(*pair, marks=[] if pair == ("phase3", 8) else pytest.mark.full) for pair in ALL]
)
def test_cluster_files_are_what_the_planner_says_now(phase: str, gpus: int, tmp_path: Path) -> None:
    """Else: make cluster-configs."""
    file, said = cluster_files(phase, gpus)
    written = tmp_path / "now.json"
    words = ("launch/plan.py", "--ds_config", f"ds_configs/{phase}.json", "--gpus", str(gpus), "--list", "3")
    result = run_program(*words, "--write", str(written))
    assert result.returncode == 0, result.stderr
    assert json.loads(written.read_text()) == json.loads(file.read_text())
    assert result.stdout == said.read_text()
