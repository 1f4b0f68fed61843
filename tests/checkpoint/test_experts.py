"""Checkpoints of mixtures of experts: any ep reads what any other wrote, bit for bit; one process reads them all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.model.init import views_of
from tests.checkpoint.test_layouts import assert_goes_on, assert_loads, whole_tensors
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

MOE = {"num_experts": 4, "moe_intermediate_size": 24, "router_bias_update_rate": 0.01, "num_shared_experts": 1}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 1),
    "ep2_zero2": (2, EP2, 2),
    "ep4_zero3": (4, {"expert_model_parallel_size": 4}, 3),
    "ep2_tp2": (4, {**EP2, "tensor_model_parallel_size": 2}, 1),
    "ep2_pp2": (4, {**EP2, "pipeline_model_parallel_size": 2}, 1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training step by each layout, saved."""
    folders = {}
    for name, (world, layout, stage) in LAYOUTS.items():
        output = tmp_path_factory.mktemp(name)
        run_ranks(world, train_here, run_config(layout, stage, model=MOE), output, 1)
        folders[name] = output / "checkpoints" / "step_1"
    return folders


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one", "ep2_zero2"),
        ("ep2_zero2", "ep4_zero3"),
        ("ep4_zero3", "ep2_tp2"),
        ("ep2_tp2", "ep2_pp2"),
        ("ep2_pp2", "one"),
    ],
)
def test_from_one_layout_to_the_next(saved: dict[str, Path], source: str, target: str) -> None:
    world, layout, stage = LAYOUTS[target]
    assert_loads(run_config(layout, stage, model=MOE), world, saved[source])


@pytest.mark.full
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_to_any(saved: dict[str, Path], source: str, target: str) -> None:
    world, layout, stage = LAYOUTS[target]
    assert_loads(run_config(layout, stage, model=MOE), world, saved[source])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps by ep 2."""
    world, layout, stage = LAYOUTS["ep2_zero2"]
    output = tmp_path_factory.mktemp("whole")
    run_ranks(world, train_here, run_config(layout, stage, model=MOE), output, 6)
    return output


@pytest.mark.parametrize("target", ["ep2_zero2", "ep4_zero3", "one"])
def test_three_steps_by_another_layout(whole: Path, target: str, tmp_path: Path) -> None:
    world, layout, stage = LAYOUTS[target]
    config = run_config(layout, stage, model=MOE)
    assert_goes_on(whole, tmp_path / "parts", config, world, same=target == "ep2_zero2")


def test_load_model_and_its_names(saved: dict[str, Path]) -> None:
    model, config = load_model(saved["ep2_tp2"])
    assert config.parallel.expert_model_parallel_size == 2
    tensors = whole_tensors(saved["ep2_tp2"])
    for parameter in model.parameters():
        assert all(torch.equal(view, tensors[f"model.{shard.name}"]) for shard, view in views_of(parameter))
    bias = tensors["model.blocks.1.mlp.router.bias"]
    assert torch.equal(model.blocks[1].mlp.router.bias, bias)
    assert bias.abs().max() == torch.tensor(0.01)
    assert tensors["model.blocks.1.mlp.experts.gate_proj"].shape == (4, 24, 32)
    for folder in saved.values():
        assert whole_tensors(folder).keys() == tensors.keys()
