"""Updates of the engine whose blocks run by graphs equal those of the engine without, bit for bit: what ZeRO takes from
the graphs' memory is there no longer in the next micro-batch. Without a GPU (tests/recorded_graphs.py)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config, ConfigError, parse_config
from neomoba_dist.data.batch import LEAST_DOCUMENTS, Batch
from neomoba_dist.train import engine as engine_module
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.engines import FlatEngine, build_engine
from neomoba_dist.train.gradient_sums import add_in_place
from tests.equivalence import Pieces, state_pieces
from tests.models import LENGTH
from tests.parallel.test_engines import make_config, updates
from tests.ranks import run_ranks
from tests.recorded_graphs import RecordedGraph, recorded_graphs
from tests.runs import build_mesh, metrics, run_config, train_here

ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {"overlap_comm": True}),
    "zero2": (2, {}),
    "zero1_plain": (1, {"contiguous_gradients": False, "overlap_comm": False}),
    "zero2_small_buckets": (2, {"reduce_bucket_size": 1000, "overlap_comm": True}),
    "zero1_offload": (1, {"offload_optimizer": {"device": "cpu"}}),
    "zero2_offload": (2, {"offload_optimizer": {"device": "cpu"}}),
}


def graphs_config(zero: str, objective: str, model: dict[str, Any]) -> Config:
    stage, settings = ZERO[zero]
    tree = make_config(objective, {}, stage, model, tokens_per_update=4 * LENGTH).to_dict()
    tree["zero_optimization"] |= settings
    return parse_config({**tree, "bf16": {"enabled": True}})


def with_many_documents(batch: Batch) -> Batch:
    """The same tokens as documents of three, more than `Batch.trimmed` keeps room for at least."""
    borders = torch.arange(0, LENGTH + 3, 3, dtype=torch.int32).clamp(max=LENGTH)
    assert len(borders) > LEAST_DOCUMENTS + 1
    return replace(batch, cu_seqlens=borders, position_ids=torch.arange(LENGTH) % 3)


def padded(batch: Batch) -> Batch:
    """With room for 64 documents, as all batches of a phase have the same."""
    return replace(batch, cu_seqlens=torch.nn.functional.pad(batch.cu_seqlens, (0, 65), value=LENGTH)[:65])


def trained(config: Config, captured: bool) -> tuple[list[Sequence[float]], Pieces]:
    """Three updates: what they report, and the weights and moments after them. The second has full attention, and its
    last two micro-batches many documents.

    Gradients from graphs wait for the end of a backward pass where ZeRO-1 lets them, as in compiled engines.
    """
    torch.compile = partial(torch.compile, backend="eager")
    engine_module.add_in_place = lambda zero, *, together: add_in_place(zero, together=captured)
    mesh = build_mesh(config)
    engine: Engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    assert isinstance(engine, FlatEngine)
    if captured:
        recorded_graphs(pytest.MonkeyPatch())
        engine.capture_blocks()
    reports = []
    for step, batches in enumerate(updates(config.model.objective)):
        engine.set_full_attention(step == 1)
        if step == 1:
            batches = [*batches[:2], *map(with_many_documents, batches[2:])]
        engine.set_step(step + 1)
        result = engine.update([*map(padded, batches[mesh["dp"].index :: mesh["dp"].size])], 1e-2)
        reports.append((result.loss, result.aux_loss, result.grad_norm, *result.activation_rms))
    if captured:
        blocks, micro_batches = config.model.num_layers, 4 // mesh["dp"].size
        assert RecordedGraph.replays == 3 * micro_batches * 2 * blocks
    return reports, [piece for kind in ("model", "exp_avg") for piece in state_pieces(engine, kind)]


@pytest.mark.parametrize(
    ("zero", "objective", "model"),
    [
        ("zero1", "clm", {}),  # a tied matrix, both of whose uses are outside of the graphs
        ("zero2", "mlm", {"num_experts": 4, "moe_intermediate_size": 16, "router_bias_update_rate": 0.01}),
        pytest.param("zero1", "mlm", {"num_experts": 4, "moe_intermediate_size": 16}, marks=pytest.mark.full),
        *(pytest.param(zero, "mlm", {}, marks=pytest.mark.full) for zero in ZERO),
    ],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.full)])
def test_updates_are_the_same(ranks: int, zero: str, objective: str, model: dict[str, Any]) -> None:
    config = graphs_config(zero, objective, model)
    expected, found = (run_ranks(ranks, trained, config, captured) for captured in (False, True))
    for (those, weights), (these, others) in zip(expected, found, strict=True):
        assert those == these
        for (one, value), (other, again) in zip(weights, others, strict=True):
            assert one == other
            assert torch.equal(value, again), one.name


@pytest.mark.full
def test_gradients_that_are_summed_where_they_lie_are_lost() -> None:
    """Why config/cuda_graphs.py wants float32 sums beside half-precision gradients."""
    tree = graphs_config("zero1_plain", "mlm", {}).to_dict()
    config = parse_config({**tree, "data_types": {"grad_accum_dtype": "bf16"}})
    (expected, _), (found, _) = (run_ranks(1, trained, config, captured)[0] for captured in (False, True))
    assert expected[0] != found[0]


def build_captured(config: Config, *others: Any) -> Engine:
    recorded_graphs(pytest.MonkeyPatch())
    engine = build_engine(config, *others)
    assert isinstance(engine, FlatEngine)
    engine.capture_blocks()
    return engine


@pytest.mark.full
def test_a_run_is_the_same(tmp_path: Path) -> None:
    """Real text, rehearsal, both kinds of steps, validation, checkpoints: what is logged and what is saved."""
    config = run_config({}, deepspeed={"bf16": {"enabled": True}})
    saved = []
    for name, build in (("plain", build_engine), ("graphs", build_captured)):
        run_ranks(2, partial(train_here, rehearsed=True, build=build), config, tmp_path / name, 6)
        folder = tmp_path / name / "checkpoints/step_6"
        saved.append({path.name: path.read_bytes() for path in folder.rglob("*.safetensors")})
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "graphs")
    assert saved[0]
    assert saved[0] == saved[1]


def refused_here(config: Config) -> str:
    mesh = build_mesh(config)
    with pytest.raises(ConfigError) as caught:
        build_engine(config, config.plan(1), mesh)
    return str(caught.value)


def test_without_a_gpu_it_is_one_line() -> None:
    config = graphs_config("zero1", "mlm", {})
    config = replace(config, phase=replace(config.phase, compile="cuda_graphs"))
    assert run_ranks(1, refused_here, config) == [
        "neomoba.phase.compile cuda_graphs: there is no GPU here; set it to auto"
    ]
