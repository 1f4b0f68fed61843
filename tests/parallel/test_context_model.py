"""Context parallelism through the whole model equals the single process in float64: loss and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import Mesh
from tests.equivalence import assemble, assert_same, parallel_rank, single_process
from tests.models import tiny_batch, tiny_model
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, {}),
    "cp3": (3, {}),  # 64 tokens and 2 KV heads are no multiples
    "cp4_auto": (4, {}),
    "cp4_routed": (4, {"context_parallel_moba": "route_queries", "context_parallel_full": "ring"}),
    "cp2_tp2": (2, TP2),
    "cp2_tp2_sp": (2, {**TP2, "sequence_parallel": True, "context_parallel_moba": "route_queries"}),
    "cp2_tp4": (2, {"tensor_model_parallel_size": 4}),  # KV heads are replicated
    "cp3_tp2_sp": (3, {**TP2, "sequence_parallel": True}),  # padded to a multiple of both
}


def check(layout: str, objective: str, full: bool = False, recompute: str = "none", **changes: Any) -> None:
    size, settings = LAYOUTS[layout]
    config = tiny_model(objective=objective, tie_word_embeddings=objective == "clm", **changes)
    batches = [tiny_batch(0, objective=objective), tiny_batch(1, rows=2, objective=objective)]
    loss, gradients = single_process(config, batches, full)
    assert all(g.abs().max() > 0 for g in gradients.values())
    if not full and config.layer_attentions[0] != "full":
        assert abs(loss - single_process(config, batches, True)[0]) > 1e-3, "sparse must differ from full"
    parallel = ParallelConfig(context_parallel_size=size, **settings)
    world = size * parallel.tensor_model_parallel_size
    results = run_ranks(world, parallel_rank, config, parallel, batches, full, recompute)
    for rank_loss, _ in results:
        assert abs(rank_loss - loss) < 1e-12 * abs(loss)
    assert_same(assemble([grads for _, grads in results]), gradients, rtol=1e-10)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients(layout: str, objective: str) -> None:
    check(layout, objective)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_full_steps(objective: str) -> None:
    check("cp4_routed", objective, full=True)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_layers_communicate_again(recompute: str) -> None:
    check("cp4_routed", "mlm", recompute=recompute)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_key_convolution(objective: str) -> None:
    check("cp3", objective, key_conv_width=5)
    check("cp3_tp2_sp", objective, key_conv_width=21)  # wider than a unit


@pytest.mark.parametrize("layout", ["cp2", "cp3"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_sliding_window(objective: str, layout: str) -> None:
    check(layout, objective, attention="sliding_window*2,full*1", sliding_window=9)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
def test_positions(position: str) -> None:
    check("cp3", "clm", position_embedding=position)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("cp2", {"moba_gate": "kv_group", "moba_pooling": "max"}),
        ("cp3", {"moba_pooling": "minmax"}),
        ("cp4_auto", {"moba_pooling": "representative"}),
        ("cp4_routed", {"moba_gate": "kv_group"}),
        ("cp2_tp2", {"moba_gate": "kv_group", "moba_pooling": "minmax"}),
    ],
)
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_gates_and_poolings(layout: str, changes: dict[str, Any], objective: str) -> None:
    config = tiny_model(objective=objective, tie_word_embeddings=objective == "clm")
    batches = [tiny_batch(0, objective=objective), tiny_batch(1, rows=2, objective=objective)]
    standard, other = (single_process(replace(config, **extra), batches)[0] for extra in ({}, changes))
    assert standard != other, "the keys must reach the gate"
    check(layout, objective, **changes)


def compiled_rank(config: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """How many functions torch has traced after each of some micro-batches whose documents end elsewhere."""
    torch._dynamo.reset()  # what tests before this one compiled came along with the fork
    torch._dynamo.utils.counters.clear()
    mesh = Mesh.build(parallel, num_key_value_heads=config.num_key_value_heads)
    plain, compiled = (NeoBERT(config, mesh, seed=5) for _ in range(2))
    counts = []
    for block in compiled.blocks:
        block.compile(dynamic=False, backend="eager")
    for step in range(4):
        batch = tiny_batch(step)
        ends = torch.tensor([0, 49 - 5 * step, 59, 64, 64], dtype=torch.int32)
        batch = local_share(replace(batch, cu_seqlens=ends), mesh, config)
        losses = [model(batch)[0] for model in (plain, compiled)]
        losses[1].backward()
        torch.testing.assert_close(*(loss.detach() for loss in losses))
        counts.append(torch._dynamo.utils.counters["frames"]["total"])
    return counts


def test_traced_once_for_all_documents() -> None:
    parallel = ParallelConfig(context_parallel_size=2, context_parallel_moba="allgather_kv")
    for counts in run_ranks(2, compiled_rank, tiny_model(), parallel):
        assert counts == [counts[0]] * 4
        assert counts[0] > 0
