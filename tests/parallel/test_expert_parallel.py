"""Expert parallelism equals the single process in float64: loss, auxiliary loss, counts, every gradient, bytes sent."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.data.batch import Batch
from tests.equivalence import assemble, assert_same
from tests.expert_parallel import Outcome, in_one_process, moe_model, on_this_rank, padded_batches
from tests.models import LENGTH
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "ep2_dp4": (4, {"expert_model_parallel_size": 2}),
    "ep8": (8, {"expert_model_parallel_size": 8}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "ep2_tp2": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "ep2_tp2_sp": (
        4,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep4_cp2": (4, {"expert_model_parallel_size": 4, "context_parallel_size": 2}),
    "ep4_above_dp1": (4, {"expert_model_parallel_size": 4, "context_parallel_size": 4}),
    "ep2_cp2_tp2_sp": (
        4,
        {
            "expert_model_parallel_size": 2,
            "context_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "ep2_tp4_sp": (
        8,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 4, "sequence_parallel": True},
    ),
}
DEEPSEEK = {"router_scoring": "sigmoid", "router_bias_update_rate": 0.1, "n_group": 4, "topk_group": 2}
ROUTINGS: dict[str, tuple[dict[str, Any], list[float] | None]] = {
    "softmax": ({}, None),
    "deepseek": ({**DEEPSEEK, "router_jitter": 0.2}, [0.1, -0.1, 0.2, 0.0, -0.2, 0.1, 0.0, 0.0]),
    "reroute": ({"moe_capacity_factor": 1.0, "moe_overflow": "reroute"}, None),
    "pad": ({"moe_capacity_factor": 0.75, "moe_overflow": "pad"}, None),
    # every token's first choice is expert 6, nobody's is expert 1
    "skewed": (
        {"router_bias_update_rate": 0.1, "num_experts_per_tok": 1, "norm_topk_prob": False},
        [0, -9.0, 0, 0, 0, 0, 9.0, 0],
    ),
    "drop": ({"moe_capacity_factor": 0.75, "norm_topk_prob": False, "num_experts_per_tok": 3}, None),
    "groups": ({"n_group": 4, "topk_group": 2}, None),
}


def compare(config: ModelConfig, name: str, batches: list[Batch], bias: list[float] | None) -> list[Outcome]:
    world, layout = LAYOUTS[name]
    expected, gradients = in_one_process(config, batches, bias)
    outcomes = run_ranks(world, on_this_rank, config, ParallelConfig(**layout), batches, bias)
    assert_equal_outcomes(outcomes, expected, gradients)
    return outcomes


def assert_equal_outcomes(outcomes: list[Outcome], expected: Outcome, gradients: dict[str, torch.Tensor]) -> None:
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(expected.loss, rel=1e-12)
        assert outcome.aux_loss == pytest.approx(expected.aux_loss, rel=1e-12)
        assert outcome.aux_loss > 0.1
        assert torch.equal(outcome.records[:, :3], expected.records[:, :3])
        assert torch.equal(outcome.records[:, 4:], expected.records[:, 4:])
        torch.testing.assert_close(outcome.records[:, 3], expected.records[:, 3], rtol=1e-12, atol=0)
    merged = assemble([outcome.gradients for outcome in outcomes])
    # an expert without tokens has no gradient, but every tensor holds all experts of a layer
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert_same(merged, gradients, rtol=1e-10)


FAST = (
    "ep2",
    "ep4",
    "ep8",
    "tp2_sp",
    "ep2_tp2",
    "ep2_tp2_sp",
    "ep4_cp2",
    "ep4_above_dp1",
)  # the others are in the grid


@pytest.mark.parametrize("layout", FAST)
def test_loss_gradients_and_counts(layout: str) -> None:
    compare(moe_model(), layout, padded_batches(8), None)


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("softmax", "groups")])  # in the grid
@pytest.mark.parametrize("layout", ["ep2", "ep2_tp2", "ep2_cp2_tp2_sp"])
def test_every_kind_of_routing(layout: str, routing: str) -> None:
    changes, bias = ROUTINGS[routing]
    config = moe_model(objective="clm", **changes)
    (outcome, *_) = compare(config, layout, padded_batches(4, "clm"), bias)
    _, dropped, rerouted, _, *counts = outcome.records[0].tolist()
    assert (dropped > 0) == (routing in ("drop", "pad", "reroute"))  # rerouted ones may find no expert with room
    assert (rerouted > 0) == (routing == "reroute")
    if routing == "skewed":
        assert (counts[1], counts[6]) == (0, sum(counts))


@pytest.mark.parametrize("layout", ["ep2", "ep4", "ep2_dp4", "ep2_tp2", "ep2_tp2_sp"])
def test_bytes_are_those_of_pairs_that_live_elsewhere(layout: str) -> None:
    config, batches = moe_model(), padded_batches(4)
    world, sizes = LAYOUTS[layout]
    outcomes = run_ranks(world, on_this_rank, config, ParallelConfig(**sizes), batches)
    ep = sizes["expert_model_parallel_size"]
    micro_batches = len(batches) // (world // sizes.get("tensor_model_parallel_size", 1))
    layers, hidden, element = 2, config.hidden_size, 8
    # rows go out and back, forward and backward; counts go once
    rows = sum(4 * outcome.away * hidden * element for outcome in outcomes)
    counts = world * layers * micro_batches * (ep - 1) * (config.num_experts // ep) * 8
    assert sum(outcome.moved for outcome in outcomes) == rows + counts
    assert rows > 0
    if layout == "ep2_tp2_sp":  # each token once; without sequence parallelism, by every tp rank
        twice = run_ranks(world, on_this_rank, config, ParallelConfig(**LAYOUTS["ep2_tp2"][1]), batches)
        assert sum(outcome.away for outcome in twice) == 2 * sum(outcome.away for outcome in outcomes)


def single_row(batch: Batch, row: int) -> Batch:
    """One of the rows of tests.models.tiny_batch."""
    part = slice(row * LENGTH, (row + 1) * LENGTH)
    return replace(
        batch,
        input_ids=batch.input_ids[part],
        labels=batch.labels[part],
        position_ids=batch.position_ids[part],
        cu_seqlens=torch.tensor([0, 49, 59, LENGTH, LENGTH], dtype=torch.int32),
        row_ids=batch.row_ids[row : row + 1],
    )


@pytest.mark.parametrize(
    "layout",
    [
        "ep2_cp2_tp2_sp",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("dp2", "ep2", "cp2", "tp2_sp", "ep2_tp2_sp", "ep4_cp2")
        ),
    ],
)
def test_the_global_balance_is_that_of_all_ranks(layout: str) -> None:
    """At equal micro-batch x dp: two rows in one process, or one on each of two data-parallel ranks."""
    config = moe_model(router_aux_loss_scope="global", router_scoring="sigmoid")
    batch = padded_batches(2)[1]
    batch = replace(batch, num_valid=batch.local_valid())
    world, sizes = LAYOUTS[layout]
    dp = world // sizes.get("tensor_model_parallel_size", 1) // sizes.get("context_parallel_size", 1)
    expected, gradients = in_one_process(config, [batch])
    batches = [batch] if dp == 1 else [single_row(batch, row) for row in range(2)]
    outcomes = run_ranks(world, on_this_rank, config, ParallelConfig(**sizes), batches)
    assert_equal_outcomes(outcomes, expected, gradients)
    by_row, _ = in_one_process(replace(config, router_aux_loss_scope="row"), [batch])
    assert abs(by_row.aux_loss - expected.aux_loss) > 1e-4, "the scope must matter"


@pytest.mark.full
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid(layout: str, objective: str, routing: str) -> None:
    changes, bias = ROUTINGS[routing]
    config = moe_model(objective=objective, tie_word_embeddings=objective == "clm", **changes)
    compare(config, layout, padded_batches(8, objective), bias)
