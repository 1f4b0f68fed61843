"""A checkpoint of any layout loads into any other: the same weights and moments, bit for bit; damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neomoba_dist.checkpoint.convert import read_whole
from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.train.engine import build_engine
from tests.equivalence import Pieces, assemble, state_pieces
from tests.ranks import run_ranks
from tests.runs import build_mesh, run_config, train_here

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 1),
    "dp2_zero3": (2, {}, 3),
    "tp4_sp": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 1),
    "cp2_zero2": (2, {"context_parallel_size": 2}, 2),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training step by each layout, saved."""
    folders = {}
    for name, (world, layout, stage) in LAYOUTS.items():
        output = tmp_path_factory.mktemp(name)
        run_ranks(world, train_here, run_config(layout, stage), output, 1)
        folders[name] = output / "checkpoints" / "step_1"
    return folders


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All logical tensors of a checkpoint."""
    reader = CheckpointReader(folder)
    return {name: read_whole(reader, name) for name in reader.tensors}


def load_and_collect(config: Any, folder: Path) -> dict[str, Pieces]:
    engine = build_engine(
        config,
        config.plan(dist.get_world_size()),
        build_mesh(config),
    )
    reader = CheckpointReader(folder)
    engine.load(reader, moments=True)
    for parameter in engine.module.parameters() if config.zero_stage < 3 else ():  # what the model computes with
        assert torch.equal(parameter.shard.valid(parameter), reader.read("model", parameter.shard))
    return {kind: state_pieces(engine, kind) for kind in KINDS}


def assert_loads(config: Any, world: int, folder: Path) -> None:
    """Every logical tensor of a checkpoint is in the engines of the layout, bit for bit."""
    results = run_ranks(world, load_and_collect, config, folder)
    expected = whole_tensors(folder)
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for name, tensor in assemble([r[kind] for r in results]).items():
            logical = f"model.{name}" if kind == "model" else f"optimizer.{kind}.{name}"
            assert torch.equal(tensor, expected.pop(logical)), logical
            assert tensor.abs().max() > 0, logical
    assert not expected


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", ["dp2_zero3", "tp4_sp", "tp2_pp2"])
def test_any_to_any(saved: dict[str, Path], source: str, target: str) -> None:
    world, layout, stage = LAYOUTS[target]
    assert_loads(run_config(layout, stage), world, saved[source])


def test_layouts_write_the_same_names(saved: dict[str, Path]) -> None:
    indexes = [json.loads((folder / "index.json").read_text())["tensors"] for folder in saved.values()]
    for index in indexes[1:]:
        assert {n: e["shape"] for n, e in index.items()} == {n: e["shape"] for n, e in indexes[0].items()}


def test_load_model(saved: dict[str, Path]) -> None:
    model, config = load_model(saved["tp2_pp2"])
    assert config.parallel.pipeline_model_parallel_size == 2
    assert not model.training
    expected = whole_tensors(saved["tp2_pp2"])
    for parameter in model.parameters():
        assert torch.equal(parameter.shard.valid(parameter), expected[f"model.{parameter.shard.name}"])
    newest, _ = load_model(saved["tp2_pp2"].parents[1])
    assert torch.equal(newest.head.weight, model.head.weight)
