"""Every layout through the DeepSpeed engines equals one process in plain torch, in float32.

Three optimizer steps: loss, gradient norm, every gradient (AdamW's first moment after one step is the clipped gradient
times 1 - beta1), and the weights after the third step.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config, parse_config
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.block import Block
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.compiled import compile_summary
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.expert_groups import update_biases
from neomoba_dist.train.guard import code_fingerprint
from neomoba_dist.train.layer_stats import LayerStatistics
from tests.equivalence import Pieces, assemble, assert_same, pieces, state_pieces
from tests.models import LENGTH, tiny_batch, tiny_model
from tests.ranks import run_ranks
from tests.reference_muon import first_share, plain_optimizer
from tests.runs import build_mesh

STEPS = 3
MICRO_BATCHES = 4  # of the whole update, over all data-parallel ranks
RATE = 1e-2
# seeds under which no weight has a first gradient so near zero that AdamW makes a whole step of its rounding error
SEED, SEED_FULL = 10, 13


def make_config(
    objective: str, layout: dict[str, int | bool], stage: int, model: dict[str, Any] | None = None, **phase: object
) -> Config:
    # untied for one objective, tied for the other, so that both heads meet every layout; a layer for every stage
    stages = int(layout.get("pipeline_model_parallel_size", 1))
    settings = {"tie_word_embeddings": objective == "clm", "num_hidden_layers": max(3, stages), **(model or {})}
    network = tiny_model(objective=objective, **settings)
    return parse_config(
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "neomoba": {
                "model": vars(network),
                "parallel": layout,
                "data": {"train": "unused"},
                "phase": {
                    "name": "test",
                    "steps": STEPS,
                    "sequence_length": LENGTH,
                    "tokens_per_update": MICRO_BATCHES * LENGTH,
                    "learning_rate": RATE,
                    "seed": SEED,
                    **phase,
                },
            },
        }
    )


def updates(objective: str) -> list[list[Batch]]:
    """The micro-batches of every update, num_valid filled in; the counts differ between all of them."""
    result = []
    for step in range(STEPS):
        batches = [tiny_batch(step * MICRO_BATCHES + i, objective=objective) for i in range(MICRO_BATCHES)]
        total = sum(batch.local_valid() for batch in batches)
        assert len({batch.local_valid() for batch in batches}) >= 3
        result.append([replace(batch, num_valid=total) for batch in batches])
    return result


Reference = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]
_references: dict[str, Reference] = {}


def reference(config: Config, full: bool) -> Reference:
    """Losses, gradient norms, gradients of the first step (clipped) and final weights of a plain loop.

    It knows neither layout nor DeepSpeed, so that all tests of one model and phase share one loop.
    """
    key = repr((config.model, config.phase, config.gradient_clipping, full))
    if key not in _references:
        _references[key] = plain_loop(config, full)
    return _references[key]


def plain_loop(config: Config, full: bool, steps: Sequence[int] = range(STEPS)) -> Reference:
    """The same over some of the updates alone."""
    model = MODELS[config.model.objective](config.model, Mesh.single(), seed=config.phase.seed, row_length=LENGTH)
    set_full_attention(model, full)
    statistics = LayerStatistics(model, config.model, model.mesh)
    optimizer = plain_optimizer(model, config.phase, RATE)
    losses, norms, gradients = [], [], {}
    given = updates(config.model.objective)
    for batches in (given[step] for step in steps):
        optimizer.zero_grad()
        outputs = [model(batch) for batch in batches]
        parts = [loss / batch.num_valid for (loss, _), batch in zip(outputs, batches, strict=True)]
        (torch.stack(parts).sum() + torch.stack([aux_loss for _, aux_loss in outputs]).mean()).backward()
        losses.append(sum(float(part.detach()) for part in parts))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping or 1e9)))
        gradients = gradients or assemble([pieces(model, "grad")])
        optimizer.step()
        if config.model.moe_layers:
            update_biases(model, statistics.read(statistics.take())[1], config.model)
    return losses, norms, gradients, all_state(model)


def activation_rms(config: Config, full: bool) -> list[float]:
    """Root mean square of every layer's output over the first update, before the optimizer's first step."""
    model = MODELS[config.model.objective](config.model, Mesh.single(), seed=config.phase.seed, row_length=LENGTH)
    set_full_attention(model, full)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    outputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    for block, found in zip(blocks, outputs, strict=True):
        block.register_forward_hook(lambda module, inputs, output, found=found: found.append(output[0].detach()))
    for batch in updates(config.model.objective)[0]:
        model(batch)
    return [float(torch.cat(found).square().mean().sqrt()) for found in outputs]


def all_state(module: NeoBERT) -> dict[str, torch.Tensor]:
    """Logical tensors of a whole model: weights and the routers' biases."""
    return assemble([pieces(module, "data") + list(saved_buffers(module))])


def train_rank(
    config: Config, full: bool
) -> tuple[list[float], list[float], Pieces, Pieces, Pieces, list[list[float]]]:
    world = torch.distributed.get_world_size()
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(world), mesh)
    engine.set_full_attention(full)

    initial, first_moment, losses, norms, activations = state_pieces(engine, "model"), [], [], [], []
    dp = mesh["dp"]
    for batches in updates(config.model.objective):
        result = engine.update(batches[dp.index :: dp.size], RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        assert float(engine.engine.get_global_grad_norm()) == pytest.approx(result.grad_norm, rel=1e-5)
        assert math.hypot(*result.layer_grad_norms) == pytest.approx(result.grad_norm, rel=1e-12)
        assert min(result.layer_grad_norms) > 0
        activations.append(result.activation_rms)
        first_moment = first_moment or state_pieces(engine, "exp_avg")
    return losses, norms, initial, first_moment, state_pieces(engine, "model"), activations


def check(world: int, config: Config, full: bool = False) -> None:
    losses, norms, gradients, weights = reference(config, full)
    assert abs(losses[0] - reference(config, not full)[0][0]) > 1e-3, "sparse must differ from full"
    results = run_ranks(world, train_rank, config, full)
    fresh = MODELS[config.model.objective](config.model, Mesh.single(), seed=config.phase.seed)
    initial = assemble([r[2] for r in results])
    assert all(torch.equal(initial.pop(name), value) for name, value in all_state(fresh).items())
    assert not initial
    for rank_losses, rank_norms, *_, activations in results:
        assert activations[0] == pytest.approx(activation_rms(config, full), rel=1e-5)
        assert rank_losses[:2] == pytest.approx(losses[:2], rel=1e-5)
        assert rank_norms[:2] == pytest.approx(norms[:2], rel=1e-5)
        assert rank_losses == pytest.approx(losses, rel=2e-4)
        assert rank_norms == pytest.approx(norms, rel=2e-4)
    moments = {name: first_share(config.phase, name) * grad for name, grad in gradients.items()}
    assert all(m.abs().max() > 0 for m in moments.values())
    assert_same(assemble([r[3] for r in results]), moments, rtol=2e-5)
    assert_same(assemble([r[4] for r in results]), weights, rtol=2e-4)


LAYOUTS = {
    "dp2_zero1": (2, {}, 1),
    "dp2_zero2": (2, {}, 2),
    "dp2_zero3": (2, {}, 3),
    "dp4_zero3": (4, {}, 3),
    "tp2_zero1": (2, {"tensor_model_parallel_size": 2}, 1),
    "tp2_sp_dp2_zero2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    "tp2_dp2_zero3": (4, {"tensor_model_parallel_size": 2}, 3),
    "tp4_sp_zero1": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 1),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 1),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}, 1),
    "pp4": (4, {"pipeline_model_parallel_size": 4}, 1),
    "tp2_pp2_dp2": (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
    "cp2_zero2": (2, {"context_parallel_size": 2}, 2),
    "cp4_zero1": (4, {"context_parallel_size": 4}, 1),
    "cp2_dp2_zero3": (4, {"context_parallel_size": 2, "context_parallel_moba": "route_queries"}, 3),
    "tp2_sp_cp2_zero2": (
        4,
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        2,
    ),
    "cp2_pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
    "tp2_cp2_pp2": (
        8,
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        1,
    ),
    "tp2_sp_pp2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
        1,
    ),
}


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps(layout: str, objective: str) -> None:
    world, parallel, stage = LAYOUTS[layout]
    check(world, make_config(objective, parallel, stage))


@pytest.mark.parametrize("layout", ["dp2_zero2", "dp2_zero3", "tp2_sp_dp2_zero2", "tp2_sp_pp2", "cp2_dp2_zero3"])
def test_bf16(layout: str) -> None:
    """bf16 compute with fp32 masters: near the float32 losses, and one set of weights on all ranks."""
    world, parallel, stage = LAYOUTS[layout]
    config = make_config("mlm", parallel, stage)
    losses, norms, *_ = reference(config, False)
    config = parse_config({**config.to_dict(), "bf16": {"enabled": True}})
    results = run_ranks(world, train_rank, config, False)
    assert {tuple(r[0]) for r in results} == {tuple(results[0][0])}
    assert results[0][0] == pytest.approx(losses, rel=2e-2)
    assert results[0][1] == pytest.approx(norms, rel=1e-1)
    for kind in (2, 3, 4):  # initial weights, first moment, final weights: fp32, and every copy agrees
        assert all(value.dtype == torch.float32 for value in assemble([r[kind] for r in results]).values())


@pytest.mark.full
@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_full_steps(layout: str, objective: str) -> None:
    world, parallel, stage = LAYOUTS[layout]
    check(world, make_config(objective, parallel, stage, seed=SEED_FULL), full=True)


@pytest.mark.parametrize("layout", ["dp2_zero2", "dp2_zero3", "tp2_sp_pp2"])
def test_full_attention_and_recompute(layout: str) -> None:
    """The full steps of phase 3, with every layer recomputed; and the attention core alone."""
    world, parallel, stage = LAYOUTS[layout]
    check(world, make_config("mlm", parallel, stage, recompute="full", recompute_every=2, seed=SEED_FULL), full=True)
    check(world, make_config("clm", parallel, stage, recompute="selective"))


def compiled_rank(config: Config, backend: str) -> tuple[list[float], list[float], dict[str, int], int, int, str]:
    torch._dynamo.reset()  # what tests before this one compiled came along with the fork
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.compile = partial(torch.compile, backend=backend)  # that of modules, too
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(torch.distributed.get_world_size()), mesh)
    dp = mesh["dp"]
    results = [engine.update(batches[dp.index :: dp.size], RATE) for batches in updates(config.model.objective)]
    assert torch.compiler.config.cache_key_tag == code_fingerprint()
    graphs, kept = counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]
    losses, norms = ([getattr(result, name) for result in results] for name in ("loss", "grad_norm"))
    return losses, norms, dict(counters["graph_break"]), graphs, kept, compile_summary()


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1}


def check_compiled(world: int, config: Config, backend: str) -> tuple[dict[str, int], int, int, str]:
    """The losses and norms are those of the plain loop. Returns graph breaks, graphs, those kept, and the summary."""
    plain = replace(config, phase=replace(config.phase, compile=False, recompute="none", recompute_every=1))
    losses, norms, *_ = reference(plain, False)
    results = run_ranks(world, compiled_rank, config, backend, timeout=280)
    for got, got_norms, *_ in results:
        assert got == pytest.approx(losses, rel=2e-4)
        assert got_norms == pytest.approx(norms, rel=2e-4)
    return results[0][2:]


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """neomoba.phase.compile: the same losses, no graph break, and one graph per kind of block and for each direction of
    the loss, so no recompilation; a later run compiles none of them again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for kept in (0, 4):
        graph_breaks, *numbers, summary = check_compiled(1, make_config("clm", {}, 1, compile=True), "inductor")
        assert graph_breaks == {}
        assert numbers == [4, kept]
        assert summary.endswith(f"s: 4 graphs, {kept} of them kept from an earlier run")


def test_compiled_experts_and_recomputation() -> None:
    """No break either: dense, MoBA and recomputed; experts and MoBA; experts, full and recomputed; the loss."""
    config = make_config("mlm", {}, 1, EXPERTS, compile=True, recompute="full", recompute_every=2)
    assert check_compiled(1, config, "aot_eager")[:2] == ({}, 5)


COMPILED: dict[str, tuple[int, dict[str, Any], int, dict[str, Any], str]] = {
    "dp2_zero2": (2, {}, 2, {}, "none"),
    "dp2_zero3": (2, {}, 3, {}, "full"),
    "tp2_zero1": (2, {"tensor_model_parallel_size": 2}, 1, {}, "selective"),
    "tp2_sp_dp2_zero2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2, EXPERTS, "none"),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 1, {}, "full"),
    "cp2_zero2": (2, {"context_parallel_size": 2}, 2, {}, "selective"),
    "ep2_zero2": (2, {"expert_model_parallel_size": 2}, 2, EXPERTS, "full"),
    "reroute": (1, {}, 1, {**EXPERTS, "moe_capacity_factor": 1.0, "moe_overflow": "reroute"}, "none"),
}


@pytest.mark.full
@pytest.mark.parametrize("layout", COMPILED)
def test_compiled_layouts(layout: str) -> None:
    """Exact on every layout, also where collectives break the graph."""
    world, parallel, stage, model, recompute = COMPILED[layout]
    config = make_config("mlm", parallel, stage, model, compile=True, recompute=recompute)
    graph_breaks = check_compiled(world, config, "aot_eager")[0]
    assert (graph_breaks == {}) == (layout in ("dp2_zero2", "pp2"))
