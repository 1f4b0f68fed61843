"""Blocks as CUDA graphs (train/graphs.py) against blocks as they are, without a GPU (tests/recorded_graphs.py)."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.config import ConfigError
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.graphs import CapturedBlocks
from neomoba_dist.train.layer_stats import LayerStatistics
from tests.models import tiny_batch, tiny_model
from tests.recorded_graphs import RecordedGraph, recorded_graphs

KINDS: dict[str, dict[str, Any]] = {
    "moba": {"key_conv_width": 3, "qk_norm": True},
    "clm": {"objective": "clm", "moba_gate": "kv_group"},
    "window": {"attention": "sliding_window", "sliding_window": 4, "global_tokens": 2, "sliding_rope_theta": 100.0},
    "dropout": {"dropout": 0.2, "norm_placement": "post", "norm": "layernorm"},
    "alibi": {"position_embedding": "alibi"},
    "t5": {"position_embedding": "t5_relative"},
    "experts": {"num_experts": 4, "moe_intermediate_size": 16, "num_shared_experts": 1, "router_jitter": 0.1},
    "capacity": {"num_experts": 4, "moe_capacity_factor": 1.0, "first_k_dense_replace": 1, "router_z_loss_coef": 0.1},
}
REROUTE = {**KINDS["capacity"], "moe_overflow": "reroute"}


@pytest.fixture(autouse=True)
def _graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graphs(monkeypatch)


def batch_of(step: int, objective: str) -> Batch:
    """Two rows; in every second step with the borders of documents elsewhere."""
    batch = tiny_batch(step, rows=2, objective=objective)
    if step % 2 == 0:
        return batch
    borders = torch.tensor([0, 7, 40, 64, 80, 128, 128, 128], dtype=torch.int32)[: len(batch.cu_seqlens)]
    positions = torch.cat([torch.arange(length) for length in borders.diff().tolist()])
    return replace(batch, cu_seqlens=borders, position_ids=positions)


def passes(changes: dict[str, Any], *, captured: bool, recompute: str = "none") -> tuple[list[list[torch.Tensor]], int]:
    """What six micro-batches of two kinds of steps give: losses, gradients and statistics. And graphs recorded."""
    config = tiny_model(**changes)
    model = NeoBERT(config, Mesh.single(), seed=5, dtype=torch.float64, recompute=recompute)
    statistics = LayerStatistics(model, config, Mesh.single())
    blocks = CapturedBlocks(model.blocks, statistics.sums)
    if captured:
        model.run_block = blocks
    model.train()
    found = []
    for step, full in enumerate((False, False, True, True, False, True)):
        set_full_attention(model, full)
        for block in model.blocks:
            if config.num_experts and hasattr(block.mlp, "router"):
                block.mlp.router.set_step(step)
        model.step = step
        sums, aux_loss = model(batch_of(step, config.objective))
        (sums + aux_loss).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        found.append([sums.detach(), aux_loss.detach().clone(), *gradients, statistics.take()])
    return found, blocks.number


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_same_bits(kind: str) -> None:
    expected, _ = passes(KINDS[kind], captured=False)
    found, number = passes(KINDS[kind], captured=True)
    layers = tiny_model(**KINDS[kind]).num_hidden_layers
    assert number == 2 * 2 * layers  # forward and backward, for both kinds of steps
    assert RecordedGraph.replays == 6 * 2 * layers
    for step, (those, these) in enumerate(zip(expected, found, strict=True)):
        assert len(those) == len(these)
        for one, other in zip(those, these, strict=True):
            assert torch.equal(one, other), step
    assert not torch.equal(expected[0][0], expected[1][0])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_lies_within_the_graphs(recompute: str) -> None:
    expected, _ = passes(KINDS["moba"], captured=False)
    for those, these in zip(expected, passes(KINDS["moba"], captured=True, recompute=recompute)[0], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(those, these, strict=True))


def test_what_waits_for_the_host_is_not_recorded() -> None:
    """Why config/cuda_graphs.py refuses rerouting, which loops until every token has a place."""
    with pytest.raises(ConfigError, match=r"cannot be recorded on this device \(.*not permitted.*\); set it to auto"):
        passes(REROUTE, captured=True)


def test_room_for_more_documents_is_made_between_updates() -> None:
    """What was recorded for fewer goes, with its memory; graphs for more serve fewer, padded to as many borders."""
    plain, captured = (NeoBERT(tiny_model(), Mesh.single(), seed=5) for _ in range(2))
    captured.run_block = blocks = CapturedBlocks(captured.blocks, torch.zeros(1))
    recorded = []
    for step, documents in enumerate((16, 16, 32, 16)):
        blocks.make_room(documents)
        batch = tiny_batch(step, rows=2)
        tail = batch.cu_seqlens[-1:].expand(blocks.documents - 6)
        batch = replace(batch, cu_seqlens=torch.cat((batch.cu_seqlens[:7], tail)))
        for model in (plain, captured):
            model.zero_grad()
            model(batch)[0].backward()
        for one, other in zip(plain.parameters(), captured.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        (kind,) = blocks._kinds.values()
        recorded.append(weakref.ref(kind.shared[0]))
        del kind
    first, second, third, fourth = (tensor() for tensor in recorded)
    assert first is second is None
    assert third is fourth is not None


def test_kinds_that_were_given_up_are_recorded_again_at_once() -> None:
    """Not hours later, at the first full step: what does not fit should be found now."""
    model = NeoBERT(tiny_model(), Mesh.single(), seed=5)
    model.run_block = blocks = CapturedBlocks(model.blocks, torch.zeros(1))
    for full in (False, True):
        set_full_attention(model, full)
        model(tiny_batch(0))
    assert blocks.number == 2 * 2 * 3
    blocks.make_room(32)
    assert blocks.number == 0
    set_full_attention(model, False)
    model(tiny_batch(0))
    assert blocks.number == 2 * 2 * 3
    assert [block.attention.full for block in model.blocks] == [False, False, True]  # as it was set


def test_validation_runs_as_before() -> None:
    """Other shapes, no gradients: blocks as they are, whose results do not lie in a graph's memory."""
    config = tiny_model()
    plain, captured = (NeoBERT(config, Mesh.single(), seed=5) for _ in range(2))
    captured.run_block = CapturedBlocks(captured.blocks, torch.zeros(1))
    captured(tiny_batch(0))[0].backward()
    replays = RecordedGraph.replays
    for model in (plain, captured):
        model.eval()
    with torch.no_grad():
        batch = tiny_batch(1, rows=3)
        assert torch.equal(plain(batch)[0], captured(batch)[0])
    assert RecordedGraph.replays == replays
