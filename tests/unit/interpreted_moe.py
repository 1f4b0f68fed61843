"""The Triton kernels of experts in Triton's interpreter: test_moe_triton.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.moe import kernels, ops
from neomoba_dist.parallel.expert_rows import DROPPED, count_choices, order_by_expert


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
