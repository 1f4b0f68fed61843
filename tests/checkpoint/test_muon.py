"""Checkpoints of runs with Muon: one moment of each matrix; resumed bit for bit; not taken for those of AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config
from neomoba_dist.train.engines import build_engine
from tests.checkpoint.test_layouts import assert_goes_on
from tests.checkpoint.test_resume import folder_state
from tests.ranks import run_ranks
from tests.runs import build_mesh, metrics, run_config, train_here

TP2_DP2: dict[str, Any] = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps by tp 2 x dp 2 that never stopped, saved after three."""
    output = tmp_path_factory.mktemp("muon")
    run_ranks(4, train_here, run_config(TP2_DP2, 1, optimizer="muon"), output, 6)
    return output


def test_matrices_have_one_moment(whole: Path) -> None:
    kinds = CheckpointReader(whole / "checkpoints" / "step_3").index["tensors"]
    for name, entry in kinds.items():
        second = [] if name.endswith("_proj") else ["exp_avg_sq"]
        assert entry["kinds"] == ["model", "exp_avg", *second], name
    assert sum(name.endswith("_proj") for name in kinds) == 21


@pytest.mark.parametrize(
    ("world", "layout", "stage"),
    [
        (4, TP2_DP2, 1),
        (1, {}, 1),
        pytest.param(2, {}, 3, marks=pytest.mark.full),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, 1, marks=pytest.mark.full),
    ],
)
def test_three_steps_by_the_same_and_another_layout(
    whole: Path, world: int, layout: dict[str, Any], stage: int, tmp_path: Path
) -> None:
    config = run_config(layout, stage, optimizer="muon")
    assert_goes_on(whole, tmp_path, config, world, same=layout == TP2_DP2)
    if layout == TP2_DP2:
        found, expected = (folder_state(run / "checkpoints" / "step_6") for run in (tmp_path, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items() if name != "trainer")


def refusal(config: Config, folder: Path) -> str:
    engine = build_engine(config, config.plan(1), build_mesh(config))
    with pytest.raises(CheckpointError) as caught:
        engine.load(CheckpointReader(folder), moments=True)
    return str(caught.value)


def test_moments_of_another_optimizer(whole: Path, tmp_path: Path) -> None:
    """Refused in one line; the weights alone are welcome."""
    folder, adamw = whole / "checkpoints" / "step_3", run_config({}, optimizer="adamw")
    assert run_ranks(1, refusal, adamw, folder) == [
        f"{folder}: holds the moments of muon, and neomoba.phase.optimizer is adamw; set it to muon, or start from the "
        "weights with --init_from"
    ]
    run_ranks(1, train_here, adamw, tmp_path, 1, None, folder)
    assert metrics(tmp_path)[0]["loss"] < metrics(whole)[0]["loss"]
