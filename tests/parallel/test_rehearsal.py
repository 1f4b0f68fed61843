"""A rehearsed update leaves nothing behind: curve and final checkpoint of a run are bit-equal with and without it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.memory import OutOfMemoryError, memory_explained
from neomoba_dist.train.rehearsal import largest_batches, rehearse
from tests.faults.job import weights
from tests.ranks import run_ranks
from tests.runs import build_mesh, metrics, run_config, train_here

EXPERTS = {"num_experts": 4, "router_bias_update_rate": 0.1, "router_scoring": "sigmoid", "router_jitter": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, int], int, dict[str, Any]]] = {
    "dp2": (2, {}, 1, {}),
    "dp2_stage3": (2, {}, 3, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}, 2, EXPERTS),
}


def _train(config: Config, output: Path, last_step: int, resume: Path | None = None) -> None:
    train_here(config, output, last_step, resume, rehearsed=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_left_of_it(name: str, tmp_path: Path) -> None:
    world, layout, stage, model = LAYOUTS[name]
    config = run_config(layout, stage, model=model, checkpoint={"save_every": 2})
    run_ranks(world, train_here, config, tmp_path / "plain", 4)
    run_ranks(world, _train, config, tmp_path / "rehearsed", 2)
    run_ranks(world, _train, config, tmp_path / "rehearsed", 4, tmp_path / "rehearsed" / "checkpoints" / "step_2")
    plain, rehearsed = (metrics(tmp_path / run) for run in ("plain", "rehearsed"))
    assert [line["step"] for line in plain] == [1, 2, 3, 4]
    rehearsed[1].pop("validation_loss")  # at the last step of its first part
    assert rehearsed == plain
    assert weights(tmp_path / "rehearsed") == weights(tmp_path / "plain")


def test_its_rows_are_as_large_as_rows_get() -> None:
    config = run_config({})
    batches = largest_batches(config, config.plan(2))
    assert len(batches) == 2
    batch = batches[0]
    assert (batch.rows, batch.length) == (2, 128)
    assert batch.cu_seqlens[:4].tolist() == [0, 128, 256, 256]
    assert len(batch.cu_seqlens) == 2 * 33 + 1
    assert batch.local_valid() == -(-2 * 128 // 5)
    assert batch.num_valid == batch.local_valid() * 4


def _does_not_fit(config: Config) -> str:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(1), mesh)

    def forward(batches: list[Batch]) -> None:
        torch.empty(1 << 50)

    engine._run_update = forward  # type: ignore[method-assign]
    try:
        with memory_explained(config, mesh):
            rehearse(engine)
    except OutOfMemoryError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_found_by_it() -> None:
    said = run_ranks(1, _does_not_fit, run_config({}))[0]
    assert said.startswith("out of memory on rank 0 (")
