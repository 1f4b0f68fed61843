"""Every task gives the same on every layout, in batches of any size, and goes on at another world size."""

import json
from pathlib import Path
from typing import Any

import pytest

import evals.__main__ as program
from neomoba_dist.errors import MISTAKE
from tests.evals.runs import half_done, journal_lines
from tests.ranks import run_ranks

TASKS = "needle,position_loss"
NEEDLES = ["--lengths", "64,96", "--depths", "0,60", "--samples", "2"]
OPTIONS = [*NEEDLES, "--length", "96", "--rows", "5", "--buckets", "4"]


def evaluate(run: Path, output: Path, *more: object) -> int:
    words = ["run", "--tasks", TASKS, "--checkpoint", run, "--output", output, *OPTIONS, *more]
    return program.main([str(word) for word in words])


def read(output: Path, task: str) -> Any:
    return json.loads((output / f"{task}.json").read_text())["curves"]


def require_close(found: Any, expected: Any) -> None:
    """The same tree; losses within 1e-5, everything else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            require_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path], moe_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, run in {**runs, "moe": moe_run}.items():
        assert evaluate(run, folder / name) == 0
    return {name: folder / name for name in (*runs, "moe")}


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("clm", 2, ["--tp", 2]),
        ("clm", 2, ["--pp", 2]),
        ("clm", 2, ["--cp", 2]),
        ("mlm", 4, ["--tp", 2, "--cp", 2]),
        ("moe", 2, ["--ep", 2]),
        ("mlm", 2, ["--batch-tokens", 1]),  # dp 2
        ("clm", 3, ["--batch-tokens", 1000]),  # dp 3
    ],
)
def test_equals_one_process(
    runs: dict[str, Path],
    moe_run: Path,
    expected: dict[str, Path],
    kind: str,
    ranks: int,
    layout: list[object],
    tmp_path: Path,
) -> None:
    run = moe_run if kind == "moe" else runs[kind]
    assert run_ranks(ranks, evaluate, run, tmp_path, *layout) == [0] * ranks
    for task in TASKS.split(","):
        require_close(read(tmp_path, task), read(expected[kind], task))


def test_goes_on_at_another_world_size(runs: dict[str, Path], expected: dict[str, Path], tmp_path: Path) -> None:
    left = half_done(expected["clm"], tmp_path)
    before = journal_lines(tmp_path)
    assert run_ranks(2, evaluate, runs["clm"], tmp_path, "--tp", 2) == [0, 0]
    assert journal_lines(tmp_path) == before + left
    for task in TASKS.split(","):
        require_close(read(tmp_path, task), read(expected["clm"], task))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tp", 2], "--tp 2 takes 2 ranks"),
        (["--cp", 2, "--pp", 2], "takes 4 ranks"),
        (["--tp", 3], "num_attention_heads"),
        (["--ep", 2], "expert"),
    ],
)
def test_wrong_layouts(
    runs: dict[str, Path], more: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(runs["clm"], tmp_path, *more) == MISTAKE
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
