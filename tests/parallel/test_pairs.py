"""Segments and next-sentence prediction give the same on every layout: float64 without engines, float32 with them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config, ModelConfig, ParallelConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engines import build_engine
from tests.equivalence import Pieces, assemble, assert_same, pieces, state_pieces
from tests.models import LENGTH, tiny_model
from tests.pairs import PAIRS, pair_batch, pair_loss, with_counts
from tests.parallel.test_engines import MICRO_BATCHES, RATE, STEPS, make_config
from tests.ranks import run_ranks
from tests.reference_muon import first_share, plain_optimizer
from tests.runs import build_mesh

TP, PP, CP = (f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
SP = {"sequence_parallel": True}
LAYERS: dict[str, dict[str, Any]] = {
    "tp2": {TP: 2},
    "tp2_sp": {TP: 2, **SP},
    "cp2": {CP: 2},
    "cp2_tp2_sp": {CP: 2, TP: 2, **SP},
}
PARTS = ("token_loss", "next_sentence_loss", "next_sentence_accuracy")


def loss_and_gradients(config: ModelConfig, mesh: Mesh, batches: list[Batch]) -> tuple[float, Pieces]:
    """In float64, summed over the context-parallel ranks."""
    model, total = NeoBERT(config, mesh, dtype=torch.float64, seed=5), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        # the places of the first tokens are those of the share
        loss = pair_loss(model, local_share(batch, mesh, config).with_counted())
        loss.backward()
        total += loss.detach()
    for parameter in model.parameters():
        parameter.grad = all_reduce(parameter.grad, mesh, "cp")
    return float(all_reduce(total, mesh, "cp")), pieces(model, "grad")


def layer_rank(config: ModelConfig, parallel: ParallelConfig, batches: list[Batch]) -> tuple[float, Pieces]:
    return loss_and_gradients(config, Mesh.build(parallel, num_key_value_heads=config.num_key_value_heads), batches)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "dropout": 0.25, "norm_placement": "post"}])
def test_layers(changes: dict[str, Any]) -> None:
    """Loss and every gradient."""
    config = tiny_model(**PAIRS, **changes)
    batches = with_counts([pair_batch(0), pair_batch(1, rows=2), pair_batch(3)])
    labelled = [(b.next_sentence_labels >= 0).nonzero().flatten().tolist() for b in batches]  # type: ignore[operator]
    assert labelled == [[], [0, 64, 113], [0, 49, 59]]
    loss, gradients = loss_and_gradients(config, Mesh.single(), batches)
    whole = assemble([gradients])
    assert all(g.abs().max() > 0 for g in whole.values())
    assert {name for name in whole if "types" in name or "sentence" in name} == {
        "embedding.token_types",
        *(f"next_sentence.{part}.{kind}" for part in ("dense", "output") for kind in ("weight", "bias")),
    }
    for name, layout in LAYERS.items():
        parallel = ParallelConfig(**layout)
        world = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        results = run_ranks(world, layer_rank, config, parallel, batches)
        for rank_loss, _ in results:
            assert abs(rank_loss - loss) < 1e-12 * abs(loss), name
        assert_same(assemble([grads for _, grads in results]), whole, rtol=1e-10)


def updates() -> list[list[Batch]]:
    """The micro-batches of every update; one of each has no pair, and the numbers of pairs differ."""
    return [with_counts([pair_batch(step * MICRO_BATCHES + i) for i in range(MICRO_BATCHES)]) for step in range(STEPS)]


Run = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, float]]]


def reference(config: Config) -> Run:
    """Losses, gradient norms, gradients of the first step (clipped), final weights and parts of a plain loop."""
    model = NeoBERT(config.model, Mesh.single(), seed=config.phase.seed, row_length=LENGTH)
    optimizer = plain_optimizer(model, config.phase, RATE)
    losses, norms, gradients, parts = [], [], {}, []
    for step, batches in enumerate(updates()):
        model.step = step
        optimizer.zero_grad()
        sums = torch.stack([model(batch)[0] for batch in batches]).sum(0)
        means = sums / torch.tensor([batches[0].num_valid, batches[0].num_pairs, batches[0].num_pairs])
        means[:2].sum().backward()
        losses.append(float(means[:2].detach().sum()))
        parts.append(dict(zip(PARTS, means.tolist(), strict=True)))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping or 1e9)))
        gradients = gradients or assemble([pieces(model, "grad")])
        optimizer.step()
    return losses, norms, gradients, assemble([pieces(model, "data")]), parts


def train_rank(
    config: Config, given: list[list[Batch]]
) -> tuple[list[float], list[float], Pieces, Pieces, list[dict[str, float]], Any]:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    engine.set_full_attention(False)
    dp, losses, norms, parts, first_moment = mesh["dp"], [], [], [], []
    before = engine.evaluate(given[0][dp.index :: dp.size])
    for step, batches in enumerate(given):
        engine.set_step(step)
        result = engine.update(batches[dp.index :: dp.size], RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        parts.append(dict(result.parts))
        first_moment = first_moment or state_pieces(engine, "exp_avg")
    return losses, norms, first_moment, state_pieces(engine, "model"), parts, before


ENGINES = {
    "dp2_zero1": (2, {}, 1, {}, "none"),
    "dp2_zero2": (2, {}, 2, {"tie_word_embeddings": True}, "none"),
    "dp2_zero3_recomputed": (2, {}, 3, {"dropout": 0.25}, "full"),
    "tp2_sp_dp2_zero2": (4, {TP: 2, **SP}, 2, {}, "selective"),
    "cp2_dp2_zero3": (4, {CP: 2}, 3, {}, "none"),
    "pp2_tied_dropped": (2, {PP: 2}, 1, {"tie_word_embeddings": True, "dropout": 0.25}, "full"),
    "cp2_pp2": (4, {CP: 2, PP: 2}, 1, {}, "none"),
    "pp2_tp2_sp": (4, {PP: 2, TP: 2, **SP}, 1, {"norm": "layernorm", "norm_placement": "post"}, "none"),
}


@pytest.mark.parametrize("layout", ENGINES)
def test_engines(layout: str) -> None:
    """Three steps: losses and their parts, gradient norms, every gradient of the first one, weights after the third."""
    world, parallel, stage, changes, recompute = ENGINES[layout]
    config = make_config("mlm", parallel, stage, model={**PAIRS, **changes}, recompute=recompute)
    losses, norms, gradients, weights, parts = reference(config)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(found["next_sentence_loss"] > 0.1 for found in parts)
    assert any(0 < found["next_sentence_accuracy"] < 1 for found in parts)
    results = run_ranks(world, train_rank, config, updates())
    for rank_losses, rank_norms, _, _, rank_parts, (validation, of_validation) in results:
        for step, rtol in enumerate((1e-5, 1e-5, 2e-4)):
            assert math.isclose(rank_losses[step], losses[step], rel_tol=rtol)
            assert math.isclose(rank_norms[step], norms[step], rel_tol=rtol)
            assert rank_parts[step] == pytest.approx(parts[step], rel=rtol)
        if not config.model.dropout:  # nothing is dropped in validation
            assert validation == pytest.approx(losses[0], rel=1e-5)
            assert of_validation == pytest.approx(parts[0], rel=1e-5)
    moments = {name: first_share(config.phase, name) * grad for name, grad in gradients.items()}
    assert_same(assemble([r[2] for r in results]), moments, rtol=2e-5)
    assert_same(assemble([r[3] for r in results]), weights, rtol=2e-4)


def compiled_rank(config: Config, given: list[list[Batch]]) -> tuple[list[float], int]:
    torch._dynamo.reset()  # what tests before this one compiled came along with the fork
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile_module(self, backend="aot_eager", **options)  # type: ignore[method-assign]
    return train_rank(config, given)[0], counters["stats"]["unique_graphs"]


def test_pairs_make_no_more_graphs() -> None:
    """As many as without pairs, in training and in validation, whatever their numbers."""
    given = updates()
    numbers = [(b.next_sentence_labels >= 0).sum().item() for batches in given for b in batches]  # type: ignore[operator]
    assert set(numbers) == {0, 1, 2, 3}
    single = [[replace(b, token_type_ids=None, next_sentence_labels=None) for b in batches] for batches in given]
    losses, *_ = reference(make_config("mlm", {}, 1, model=PAIRS))
    (paired,) = run_ranks(1, compiled_rank, make_config("mlm", {}, 1, model=PAIRS, compile=True), given, timeout=280)
    (plain,) = run_ranks(1, compiled_rank, make_config("mlm", {}, 1, compile=True), single, timeout=280)
    assert paired[0] == pytest.approx(losses, rel=2e-4)
    assert paired[1] == plain[1] > 0
