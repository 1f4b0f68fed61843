"""A checkpoint of any layout loads into any other: the same weights and moments, bit for bit, and training goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neomoba_dist.checkpoint.convert import read_whole
from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.config import Config
from neomoba_dist.model.init import views_of
from neomoba_dist.train.engines import build_engine
from tests.equivalence import Pieces, assemble, state_pieces
from tests.ranks import run_ranks
from tests.runs import build_mesh, metrics, run_config, train_here

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 1),
    "dp2_zero3": (2, {}, 3),
    "tp4_sp": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 1),
    "cp2_zero2": (2, {"context_parallel_size": 2}, 2),
    "dp4_zero2": (4, {}, 2),
    "tp2_zero3": (4, {"tensor_model_parallel_size": 2}, 3),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}, 1),
    "tp2_cp2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}, 1),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
}
SOURCES = ("dp2_zero3", "tp4_sp", "tp2_pp2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training step by some of the layouts, saved."""
    folders = {}
    for name in SOURCES:
        world, layout, stage = LAYOUTS[name]
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
        assert all(torch.equal(view, reader.read("model", shard)) for shard, view in views_of(parameter))
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


QUICK = {("dp2_zero3", "tp2_pp2"), ("tp4_sp", "dp2_zero3"), *(("tp2_pp2", target) for target in LAYOUTS)}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(source, target, marks=() if (source, target) in QUICK else pytest.mark.full)
        for source in SOURCES
        for target in LAYOUTS
    ],
)
def test_any_to_any(saved: dict[str, Path], source: str, target: str) -> None:
    world, layout, stage = LAYOUTS[target]
    assert_loads(run_config(layout, stage), world, saved[source])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps by tp 2 x pp 2 that never stopped, saved after three."""
    output = tmp_path_factory.mktemp("whole")
    world, layout, stage = LAYOUTS["tp2_pp2"]
    run_ranks(world, train_here, run_config(layout, stage), output, 6)
    return output


def assert_goes_on(whole: Path, output: Path, config: Config, world: int, *, same: bool) -> None:
    """Three steps from the checkpoint of step 3 are those of the run that never stopped; bit for bit if `same`."""
    run_ranks(world, train_here, config, output, 6, whole / "checkpoints" / "step_3")
    tolerance = {"rel": 0, "abs": 0} if same else {"rel": 2e-4}
    expected = metrics(whole)[3:]
    assert [line["step"] for line in metrics(output)] == [4, 5, 6]
    for found, line in zip(metrics(output), expected, strict=True):
        for key in {"loss", "aux_loss", "grad_norm", "validation_loss"} & line.keys():
            assert found[key] == pytest.approx(line[key], **tolerance), key
        assert {key: found[key] for key in ("valid_tokens", "lr")} == {key: line[key] for key in ("valid_tokens", "lr")}
    tensors = whole_tensors(whole / "checkpoints" / "step_6")
    for name, tensor in whole_tensors(output / "checkpoints" / "step_6").items():
        if same:
            assert torch.equal(tensor, tensors[name]), name
        else:  # a moment's smallest elements are sums of rounding errors
            assert (tensor - tensors[name]).norm() <= 1e-3 * tensors[name].norm(), name


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=() if name in ("tp2_pp2", "tp2_zero3", "one") else pytest.mark.full) for name in LAYOUTS],
)
def test_three_steps_by_another_layout(whole: Path, target: str, tmp_path: Path) -> None:
    world, layout, stage = LAYOUTS[target]
    assert_goes_on(whole, tmp_path, run_config(layout, stage), world, same=target == "tp2_pp2")


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
        assert all(torch.equal(view, expected[f"model.{shard.name}"]) for shard, view in views_of(parameter))
    newest, _ = load_model(saved["tp2_pp2"].parents[1])
    assert torch.equal(newest.head.weight, model.head.weight)
