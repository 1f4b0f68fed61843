"""Bad steps in a run: skipped on all ranks, counted, told with their rows; too many in a row end it; resumed alike."""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config, parse_config
from neomoba_dist.train import bad_steps
from neomoba_dist.train.assemble import build_stream, open_corpora
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from neomoba_dist.train.trainer import TrainingError
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

ROWS = 8  # of an update


def poison(steps: Collection[int], factor: float) -> None:
    """On the last rank alone, the gradient of the last block's output is multiplied in these steps."""
    original = Engine.set_step
    handles: list[Any] = []

    def set_step(engine: Engine, step: int) -> None:
        original(engine, step)
        while handles:
            handles.pop().remove()
        if step in steps and engine.mesh.rank == engine.mesh["world"].size - 1:
            block = engine.layer_statistics.blocks[-1]
            handles.append(block.register_forward_hook(change))

    def change(module: torch.nn.Module, given: object, output: Any) -> None:
        if output[0].requires_grad:  # not in validation
            output[0].register_hook(lambda gradient: gradient * factor)

    Engine.set_step = set_step  # type: ignore[method-assign]


def train(
    config: Config,
    output: Path,
    last_step: int,
    bad: Collection[int],
    factor: float = math.nan,
    resume: Path | None = None,
    window: int = 128,
) -> tuple[str, str]:
    """What this rank said, and the TrainingError that ended it; for `run_ranks`."""
    bad_steps.WINDOW = window
    poison(bad, factor)
    said, error = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            train_here(config, output, last_step, resume)
        except TrainingError as caught:
            error = str(caught)
    return said.getvalue(), error


def entries(run: Path) -> list[str]:
    """The steps of a run without times, as text: what is not a number equals itself."""
    timed = ("tokens_per_second", "step_seconds", "data_seconds", "tflops_per_rank", "checkpoint_pause_seconds")
    return [json.dumps({k: v for k, v in e.items() if k not in timed}) for e in read_metrics(run / METRICS_FILE)]


def trained_state(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{step}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"tensor_model_parallel_size": 2}, marks=pytest.mark.full),
        {"pipeline_model_parallel_size": 2},
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_skipped_steps_are_counted_and_told_with_their_rows(layout: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(layout)
    (said, error), _ = run_ranks(2, train, config, tmp_path, 6, (2, 3))
    assert not error
    log = read_metrics(tmp_path / METRICS_FILE)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert [entry["skipped"] for entry in log] == [False, True, True, False, False, False]
    assert [entry["skipped_steps"] for entry in log] == [0, 1, 2, 2, 2, 2]
    alone = run_config({})
    rows = build_stream(alone, alone.plan(1), open_corpora(alone).train, 0).rows
    for entry in log:
        assert ("row_ids" in entry) == ("skip_reason" in entry) == entry["skipped"]
        if entry["skipped"]:
            first = (entry["step"] - 1) * ROWS
            assert entry["row_ids"] == rows.row_ids(torch.arange(first, first + ROWS).numpy()).tolist()
            assert entry["skip_reason"] == "the gradient norm is nan"
        else:
            assert math.isfinite(entry["loss"])
            assert math.isfinite(entry["grad_norm"])
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    shown = ", ".join(map(str, log[1]["row_ids"]))
    assert warnings[0].startswith(f"warning: step 2 skipped: the gradient norm is nan; rows {shown}; ")
    assert f"python -m data_tools.inspect_shards --rows-of-step 2 --run {tmp_path}" in warnings[0]
    assert "skipped so far 2" in next(line for line in said.splitlines() if line.startswith("test 4/6"))


def test_a_run_resumed_in_a_bad_series_decides_as_the_undisturbed_one(tmp_path: Path) -> None:
    config = run_config({}, steps=8, checkpoint={"save_every": 2})
    bad = (3, 4, 5, 7)
    run_ranks(2, train, config, tmp_path / "whole", 8, bad)
    run_ranks(2, train, config, tmp_path / "parts", 5, bad)
    middle = tmp_path / "parts" / "checkpoints" / "step_4"
    assert CheckpointReader(middle).trainer()["judge"]["in_a_row"] == 2
    run_ranks(2, train, config, tmp_path / "parts", 8, bad, math.nan, middle)
    assert entries(tmp_path / "parts") == entries(tmp_path / "whole")
    assert trained_state(tmp_path / "parts", 8) == trained_state(tmp_path / "whole", 8)


def test_too_many_in_a_row_end_the_run_also_over_a_resume(tmp_path: Path) -> None:
    tree = run_config({}, steps=8, checkpoint={"save_every": 2}).to_dict()
    tree["neomoba"]["health"]["max_skipped_steps"] = 3
    config = parse_config(tree)
    bad = (1, 4, 5, 6, 7)
    results = run_ranks(2, train, config, tmp_path / "whole", 8, bad)
    run_ranks(2, train, config, tmp_path / "parts", 5, bad)
    again = run_ranks(
        2, train, config, tmp_path / "parts", 8, bad, math.nan, tmp_path / "parts" / "checkpoints" / "step_4"
    )
    assert len({error.replace("parts", "whole") for _, error in (*results, *again)}) == 1
    error = results[0][1]
    assert error.startswith("step 6: 3 steps in a row were skipped, the last one because the gradient norm is nan; ")
    assert "neomoba.health.max_skipped_steps" in error
    assert "\n" not in error
    assert entries(tmp_path / "parts") == entries(tmp_path / "whole")
    assert len(entries(tmp_path / "whole")) == 6


def test_a_spike_is_skipped_and_a_resumed_window_is_the_same(tmp_path: Path) -> None:
    config = run_config({}, steps=8, checkpoint={"save_every": 5}, learning_rate=1e-3)
    run_ranks(2, train, config, tmp_path / "whole", 8, (7,), 100.0, None, 4)
    log = read_metrics(tmp_path / "whole" / METRICS_FILE)
    assert not any(entry["skipped"] for entry in log[:4])  # the window is not full
    assert log[6]["skipped"]
    assert log[6]["skip_reason"].startswith(f"the gradient norm {log[6]['grad_norm']:.4g} is more than 6 sigma above")
    assert log[6]["grad_norm"] > 10 * log[3]["grad_norm"]
    run_ranks(2, train, config, tmp_path / "parts", 6, (7,), 100.0, None, 4)
    middle = tmp_path / "parts" / "checkpoints" / "step_5"
    run_ranks(2, train, config, tmp_path / "parts", 8, (7,), 100.0, middle, 4)
    assert entries(tmp_path / "parts") == entries(tmp_path / "whole")
    assert trained_state(tmp_path / "parts", 8) == trained_state(tmp_path / "whole", 8)


def test_a_learning_rate_that_ruins_the_weights_ends_the_program_with_one_line(tmp_path: Path) -> None:
    tree = run_config({}, steps=40, learning_rate=1e30, warmup_steps=0).to_dict()
    tree["neomoba"]["health"]["max_skipped_steps"] = 5
    (tmp_path / "config.json").write_text(json.dumps(tree))
    words = ("launch/pretrain.py", "--ds_config", tmp_path / "config.json", "--output_dir", tmp_path / "run")
    done = run_program(*words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "5 steps in a row were skipped" in errors[0]
    log = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [entry["skipped"] for entry in log[-5:]] == [True] * 5


def collectives(config: Config, output: Path) -> list[int]:
    """Our own from the beginning of each update to that of the next."""
    counts: list[int] = []
    update = Engine.update

    def counted(engine: Engine, *given: Any) -> Any:
        counts.append(sum(entry.calls for entry in engine.mesh.ledger.entries.values()))
        return update(engine, *given)

    Engine.update = counted  # type: ignore[method-assign]
    train_here(config, output, 6)
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.parametrize(
    ("world", "layout", "stage"),
    [(2, {}, 3), (4, {"pipeline_model_parallel_size": 2}, 1)],
    ids=["dp2_zero3", "pp2_dp2"],
)
def test_one_collective_of_ours_per_update(world: int, layout: dict[str, Any], stage: int, tmp_path: Path) -> None:
    """From one update to the next, with nothing saved or validated in between."""
    config = run_config(layout, stage, checkpoint={"save_every": 6})
    tree = config.to_dict()
    tree["neomoba"]["log"]["validate_every"] = 6
    assert run_ranks(world, collectives, parse_config(tree), tmp_path) == [[1] * 5] * world
