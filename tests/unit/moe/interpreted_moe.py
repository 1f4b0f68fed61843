"""The Triton kernels of experts in Triton's interpreter: test_moe_triton.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.moe import balance, kernels, ops, router_kernels, router_ops
from neomoba_dist.parallel.expert_rows import DROPPED, count_choices, order_by_expert
from tests.unit.moe.test_moe import ROW, make_inputs, make_layer


def draw_choices(tokens: int, choices: int, num_experts: int, dropped: float = 0.0) -> Tensor:
    """Distinct experts of every token, int64 [S, K], some DROPPED."""
    generator = torch.Generator().manual_seed(tokens)
    expert_SK = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :choices]
    return torch.where(torch.rand(tokens, choices, generator=generator) < dropped, DROPPED, expert_SK)


@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tokens", "choices", "num_experts"), [(1, 1, 1), (70, 2, 8), (257, 3, 32), (300, 2, 300)])
def test_the_order_is_that_of_a_stable_sort(tokens: int, choices: int, num_experts: int, dropped: float) -> None:
    expert_SK = draw_choices(tokens, choices, num_experts, dropped)
    counts_E = count_choices(expert_SK, num_experts)
    rows = int(counts_E.sum())
    expected = order_by_expert(expert_SK, counts_E, rows)
    got = kernels.sort_pairs(expert_SK, num_experts)
    assert torch.equal(got.ends_E, counts_E.cumsum(0).int())
    assert torch.equal(got.pair_P[:rows], expected.pair_P.int())
    assert torch.equal(got.slot_SK, expected.slot_SK.int())
    assert sorted(got.pair_P.tolist()) == list(range(tokens * choices))


def test_many_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section of several tiles, the last one short."""
    monkeypatch.setattr(kernels, "MOST_SECTIONS", 3)
    expert_SK = draw_choices(401, 2, 5, 0.1)
    got = kernels.sort_pairs(expert_SK, 5)
    expected = order_by_expert(expert_SK, count_choices(expert_SK, 5), int((expert_SK >= 0).sum()))
    assert torch.equal(got.slot_SK, expected.slot_SK.int())


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize(("hidden", "width", "choices"), [(16, 24, 2), (40, 16, 3), (264, 520, 1)])
def test_a_mixture_is_that_of_the_loop(
    hidden: int, width: int, choices: int, dropped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and every gradient in float32; the grouped product is torch's on the CPU. The last expert has no token."""
    generator = torch.Generator().manual_seed(0)
    expert_SK = draw_choices(45, choices, 5, dropped)
    shapes = [(45, hidden), (45, choices), (6, width, hidden), (6, width, hidden), (6, hidden, width)]
    x, weight, *experts = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    probe = torch.randn(45, hidden, generator=generator)
    results: list[tuple[Tensor, ...]] = []
    for fused in (True, False):
        monkeypatch.setattr(ops, "has_grouped_mm", lambda *tensors, fused=fused: fused)
        y = ops.mixture(x, expert_SK, weight, *experts, 0)[0]
        results.append((y, *torch.autograd.grad(y, (x, weight, *experts), probe)))
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))
    assert results[0][3][5].abs().max() == 0


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts bits off where a GPU rounds; tests/gpu/test_moe_gpu.py is stricter."""
    generator = torch.Generator().manual_seed(0)
    expert_SK = draw_choices(64, 2, 4)
    shapes = [(64, 32), (4, 48, 32), (4, 48, 32), (4, 32, 48)]
    x, *experts = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    weight, probe = torch.rand(64, 2, generator=generator), torch.randn(64, 32, generator=generator).bfloat16()
    exact = run(x.double(), expert_SK, weight.double(), experts, probe.double())
    monkeypatch.setattr(ops, "has_grouped_mm", lambda *tensors: True)
    for got, want in zip(run(x, expert_SK, weight, experts, probe), exact, strict=True):
        assert got.dtype in (torch.bfloat16, torch.float32)
        assert (got.double() - want).norm() < 1e-2 * want.norm()


def run(x: Tensor, expert_SK: Tensor, weight: Tensor, experts: list[Tensor], probe: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, *(e.to(x.dtype) for e in experts))]
    y = ops.mixture(leaves[0], expert_SK, leaves[1], *leaves[2:], 0)[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, probe)]


ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "switch": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "qwen3": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "deepseek": {"router_scoring": "sigmoid", "routed_scaling_factor": 2.5, "router_bias_update_rate": 0.1},
    "sigmoid": {"router_scoring": "sigmoid", "norm_topk_prob": False, "num_experts_per_tok": 4},
    "20 experts": {"num_experts": 20, "router_aux_loss_coef": 0.0},
    "global": {"router_aux_loss_scope": "global"},
    "no loss": {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
    "a row of padding": {"padding": True},
    "evaluation": {"training": False},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_is_that_of_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, auxiliary loss, record and every gradient in float32 against float64, which takes no kernel."""
    changes = dict(ROUTERS[name])
    padding, training = changes.pop("padding", False), changes.pop("training", True)
    monkeypatch.setattr(ops, "has_grouped_mm", lambda x, *weights: x.dtype == torch.float32)
    for module in (router_ops, balance):
        monkeypatch.setattr(module, "takes_kernels", lambda scores: scores.dtype == torch.float32)
    used = []
    original = router_kernels.route_rows
    monkeypatch.setattr(router_kernels, "route_rows", lambda *args: used.append(args[3]) or original(*args))
    x_TH, positions = make_inputs(padding)
    probe = torch.randn(x_TH.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        layer, config = make_layer(dtype, **changes)
        layer.train(training)
        layer.router.bias += torch.linspace(-0.3, 0.3, config.num_experts) * (config.router_bias_update_rate > 0)
        x = x_TH.detach().to(dtype).requires_grad_()
        y, aux_loss, record = layer(x, positions)
        assert not record.requires_grad
        loss = (y * probe.to(dtype)).sum() + aux_loss
        results.append((y, aux_loss, record, *torch.autograd.grad(loss, (x, *layer.parameters()))))
    assert used == [1 if name in ("global", "evaluation") else 2]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][2][:3], results[1][2][:3])
    assert torch.equal(results[0][2][4:], results[1][2][4:])


def test_rows_that_no_block_divides_take_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_ops, "takes_kernels", lambda scores: True)
    assert router_kernels.block_of(2 * ROW, 2, 8) == 8
    assert router_kernels.block_of(2 * 4095, 2, 8) == 0
    assert router_kernels.block_of(4095, 1, 8) == 64


def test_a_damaged_token_goes_nowhere() -> None:
    """Its scores are not numbers; the others are not touched."""
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    logits[3] = torch.nan
    scoring = router_kernels.Scoring(2, False, True, 1.0)
    valid = torch.ones(16, dtype=torch.bool)
    expert, weight, _, record = router_kernels.route_rows(logits, torch.zeros(8), valid, 1, scoring)
    assert (expert[3] == DROPPED).all()
    assert (weight[3] == 0).all()
    best, chosen = logits.softmax(1).topk(2)
    others = torch.arange(16) != 3
    assert torch.equal(expert[others], chosen[others])
    torch.testing.assert_close(weight[others], (best / best.sum(1, keepdim=True))[others])
    assert record[1] == 2


def test_three_parts_are_the_whole() -> None:
    x = torch.randn(33, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 33)[:, None]
    parts = router_kernels.split_in_three(x).unflatten(1, (3, 12))
    assert torch.equal(parts.double().sum(1).float(), x)


@pytest.mark.parametrize("tokens", [1, 70])
def test_any_number_of_tokens_in_one_row(tokens: int) -> None:
    """As decoding has them: the last block of tokens is not full."""
    logits = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(tokens, dtype=torch.bool)
    expert, weight, sums, record = router_ops.route_tokens(logits, torch.zeros(5), valid, 1, 2, False, False, 1.0)
    best, chosen = logits.softmax(1).topk(2)
    assert torch.equal(expert, chosen)
    torch.testing.assert_close(weight, best)
    torch.testing.assert_close(sums[0, :5], logits.softmax(1).sum(0))
    assert record[0] == sums[0, -1] == tokens


@pytest.mark.parametrize("fused", [True, False])
def test_operators_are_what_they_tell_the_compiler(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, strides and dtypes of all results; no result is an argument."""
    monkeypatch.setattr(ops, "has_grouped_mm", lambda *tensors: fused)
    generator = torch.Generator().manual_seed(0)
    expert_SK = draw_choices(45, 2, 5, 0.2)
    shapes = [(45, 16), (45, 2), (6, 24, 16), (6, 24, 16), (6, 16, 24)]
    x, weight, *experts = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    check(ops.mixture, x, expert_SK, weight, *experts, 0)
    saved = ops.mixture(x, expert_SK, weight, *experts, 0)[1:]
    check(ops.mixture_backward, *(t.detach() for t in (x, x, weight, *experts, *saved)), 0)
    logits, valid = torch.randn(48, 8, generator=generator), torch.ones(48, dtype=torch.bool)
    check(router_ops.route_tokens, logits.requires_grad_(), torch.zeros(8), valid, 2, 2, True, True, 1.0)
    sums = router_ops.route_tokens(logits, torch.zeros(8), valid, 2, 2, True, True, 1.0)[2]
    check(router_ops.balance_loss, sums.detach().requires_grad_(), 0.1, 0.2)


def check(operator: Any, *args: Any) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator._opoverload, args, test_utils=tests[: 3 if args[0].requires_grad else 1] + tests[2:])
