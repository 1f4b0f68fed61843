"""Full attention and MoBA by libraries on a GPU, against float64 on the CPU. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import groups
from neomoba_dist.model.attention.kernels.choice import FULL_ATTENTION, MOBA, Call, MobaCall
from neomoba_dist.model.attention.kernels.full import RUN, Documents, full_attention
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from neomoba_dist.model.attention.moba import attend, block_means, select_blocks

pytestmark = pytest.mark.gpu

LARGEST = {torch.bfloat16: 4e-2, torch.float16: 1e-2}
BORDERS = [0, 0, 700, 701, 1500, 4096]  # an empty document and one of a single token


def draw(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, tokens: int = 4096) -> list[Tensor]:
    """q, k, v that require a gradient, and a gradient for the output, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    return [x.requires_grad_(index < 3) for index, x in enumerate(drawn)]


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for result, expected in zip(got, want, strict=True):
        assert expected.any()
        largest = max(1.0, float(expected.detach().abs().max()))
        assert (result.cpu().double() - expected).abs().max() < LARGEST[dtype] * largest


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", [BORDERS, None])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [((4, 2), 64, torch.bfloat16), ((2, 2), 128, torch.bfloat16), ((3, 1), 96, torch.half)],
)
@pytest.mark.parametrize("name", ["cudnn", *LIBRARIES])
def test_full_attention(
    name: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, borders: list[int] | None, causal: bool
) -> None:
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32, device="cuda")
    q, k, v, grad = draw(heads, head_dim, dtype)
    if not FULL_ATTENTION[name](Call(q.device, dtype, head_dim, len(q), borders is not None)):
        pytest.skip(f"{name} is not installed, or does not take this call")
    out = RUN[name](q, k, v, causal, Documents(cu_seqlens, len(q), None))
    got = (out, *torch.autograd.grad(out, (q, k, v), grad))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    want = full_attention(*exact, causal=causal, cu_seqlens=None if cu_seqlens is None else cu_seqlens.cpu())
    assert_close(got, (want, *torch.autograd.grad(want, exact, grad.cpu().double())), dtype)


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_the_same_bits_where_they_are_asked_for(name: str) -> None:
    q, k, v, grad = draw((4, 2), 64, torch.bfloat16)
    if not FULL_ATTENTION[name](Call(q.device, q.dtype, 64, len(q), True)):
        pytest.skip(f"{name} is not installed, or does not take this call")
    borders = torch.tensor(BORDERS, dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(3):
            out = RUN[name](q, k, v, True, Documents(borders, len(q), None))
            runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", [BORDERS, None])
@pytest.mark.parametrize(
    ("heads", "gate", "head_dim", "block_size"),
    [((4, 2), "per_head", 64, 128), ((4, 2), "kv_group", 64, 100), ((2, 2), "per_head", 128, 512)],
)
@pytest.mark.parametrize("name", list(LIBRARIES))
def test_moba(
    name: str,
    heads: tuple[int, int],
    gate: str,
    head_dim: int,
    block_size: int,
    borders: list[int] | None,
    causal: bool,
) -> None:
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32, device="cuda")
    q, k, v, grad = draw(heads, head_dim, torch.bfloat16)
    if not MOBA[name](MobaCall(q.device, q.dtype, head_dim)):
        pytest.skip(f"{name} is not installed, or does not take this call")
    options: dict[str, Any] = {"block_size": block_size, "causal": causal}
    means = block_means(k, block_size=block_size, cu_seqlens=cu_seqlens)
    blocks = select_blocks(q, means, top_k=3, gate=gate, cu_seqlens=cu_seqlens, **options)
    out, lse = attend(q, k, v, blocks, impl=name, cu_seqlens=cu_seqlens, **options)
    got = (out, lse, *torch.autograd.grad(out, (q, k, v), grad))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    there = None if cu_seqlens is None else cu_seqlens.cpu()
    want, want_lse = attend(*exact, blocks.cpu(), cu_seqlens=there, **options)
    expected = (want, want_lse, *torch.autograd.grad(want, exact, grad.cpu().double()))
    assert_close(got, expected, torch.bfloat16)


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_moba_one_kv_head_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with much longer rows: the library gets slices of q, k, v, the output and its gradient."""
    monkeypatch.setattr(groups, "LEAST_LIMIT", 0)
    monkeypatch.setattr(groups, "LIMIT_PER_ELEMENT", 0)
    test_moba(name, (4, 2), "per_head", 64, 128, BORDERS, causal=True)
