"""MoBA and full attention on a GPU, against float64 on the CPU. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.bench.tune import KEY_TILES
from neomoba_dist.model.attention.kernels.choice import gate_kernel
from neomoba_dist.model.attention.kernels.layout import make_layout
from neomoba_dist.model.attention.kernels.select import select_blocks_any
from neomoba_dist.model.attention.kernels.triton import common
from neomoba_dist.model.attention.moba import attend, block_means, full_attention, moba_attention, select_blocks

pytestmark = pytest.mark.gpu

LARGEST = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-11}
BORDERS = [0, 0, 700, 701, 1500, 2048]


def draw(tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v that require a gradient, and a gradient for the output, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    return [x.requires_grad_(index < 3) for index, x in enumerate(drawn)]


def cu(borders: list[int]) -> Tensor:
    return torch.tensor(borders, dtype=torch.int32, device="cuda")


def assert_equals_float64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any) -> None:
    """The same block_indices on the CPU in float64 must give the same output, logsumexp and gradients."""
    gate = {name: options.pop(name) for name in ("top_k", "gate", "pooling") if name in options}
    pooling = {"pooling": gate["pooling"]} if "pooling" in gate else {}
    borders = options["cu_seqlens"]
    means = block_means(k, block_size=options["block_size"], cu_seqlens=borders, **pooling)
    block_indices = select_blocks(q, means, **gate, **options)
    out, lse = attend(q, k, v, block_indices, **options)
    loss = (out * grad).sum() + lse.sin().sum()
    got = (out, lse, *torch.autograd.grad(loss, (q, k, v)))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    there = {**options, "cu_seqlens": None if borders is None else borders.cpu()}
    out, lse = attend(*exact, block_indices.cpu(), **there)
    loss = (out * grad.cpu().double()).sum() + lse.sin().sum()
    want = (out, lse, *torch.autograd.grad(loss, exact))
    for result, expected in zip(got, want, strict=True):
        assert (result.cpu().double() - expected).abs().max() < LARGEST[q.dtype] * max(
            1.0, float(expected.detach().abs().max())
        )


# what trains first, what takes longest to compile last
DTYPES, HEAD_DIMS, HEADS = (torch.bfloat16, torch.float16, torch.float32), (64, 96, 128), ((4, 4), (4, 2), (3, 1))
# every dtype and every head_dim meets every number of heads once
CELLS = [(HEADS[(i + j) % 3], dim, dtype) for i, dtype in enumerate(DTYPES) for j, dim in enumerate(HEAD_DIMS)]


@pytest.mark.parametrize(("heads", "head_dim", "dtype"), CELLS)
def test_every_dtype_and_head_dim(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """One set of tiles each, so that few kernels are compiled: `test_grid` has the rest."""
    drawn = draw(2048, heads, head_dim, dtype)
    assert_equals_float64(*drawn, block_size=100, top_k=3, causal=True, cu_seqlens=cu(BORDERS))
    assert_equals_float64(*drawn, block_size=128, top_k=3, causal=False, cu_seqlens=None)


@pytest.mark.full
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_grid(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    for (block_size, top_k), borders in itertools.product(((128, 3), (100, 2), (32, 8), (512, 1)), (None, cu(BORDERS))):
        options = {"block_size": block_size, "top_k": top_k, "causal": causal, "cu_seqlens": borders}
        assert_equals_float64(*draw(2048, heads, head_dim, dtype), **options)


def test_float64_runs_without_triton() -> None:
    q, k, v, grad = draw(500, (4, 2), 32, torch.float64)
    assert gate_kernel(q.dtype, q.device) == "torch"
    assert_equals_float64(q, k, v, grad, block_size=64, top_k=3, causal=True, cu_seqlens=cu([0, 300, 500]))


@pytest.mark.parametrize("gate", ["per_head", "kv_group"])
@pytest.mark.parametrize("pooling", ["mean", "max", "minmax", "representative"])
def test_gate_equals_torch(pooling: str, gate: str) -> None:
    q, k, *_ = (x.detach() for x in draw(2048, (4, 2), 64, torch.float32))
    means = block_means(k, block_size=64, cu_seqlens=cu(BORDERS), pooling=pooling)
    there = block_means(k.cpu(), block_size=64, cu_seqlens=cu(BORDERS).cpu(), pooling=pooling)
    assert (means.cpu() - there).abs().max() <= 1e-6
    options = {"top_k": 4, "causal": True, "gate": gate, "pooling": pooling}
    got = select_blocks(q, means, block_size=64, cu_seqlens=cu(BORDERS), **options)
    layout = make_layout(2048, 2048, 64, cu(BORDERS), None, None, q.device)
    want = select_blocks_any(q.double(), means.double(), layout, **options)
    assert (got != want).any(-1).float().mean() < 1e-3  # near ties may fall either way in float32


def test_bits_repeat() -> None:
    q, k, v, grad = draw(8192, (8, 2), 128, torch.bfloat16)
    runs = []
    for _ in range(3):
        out = moba_attention(q, k, v, block_size=512, top_k=3, cu_seqlens=cu([0, 5000, 8192]))
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_no_synchronisation_and_no_recompilation() -> None:
    q, k, v, grad = draw(4096, (4, 2), 64, torch.bfloat16)
    layer = torch.compile(
        lambda q, k, v, b: moba_attention(q, k, v, block_size=256, top_k=3, cu_seqlens=b), fullgraph=True
    )
    borders = [cu([0, split, 4096]) for split in (100, 2000, 4096)]
    torch.autograd.grad(layer(q, k, v, borders[0]), (q, k, v), grad)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for border in borders:
                torch.autograd.grad(layer(q, k, v, border), (q, k, v), grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_attention(dtype: torch.dtype, causal: bool) -> None:
    q, k, v, grad = draw(2048, (4, 2), 64, dtype)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    for borders in (None, cu(BORDERS)):
        out = full_attention(q, k, v, causal=causal, cu_seqlens=borders, longest=None if borders is None else 800)
        want = full_attention(*exact, causal=causal, cu_seqlens=None if borders is None else borders.cpu())
        results = (out, *torch.autograd.grad(out, (q, k, v), grad))
        expected = (want, *torch.autograd.grad(want, exact, grad.cpu().double()))
        for got, wanted in zip(results, expected, strict=True):
            assert (got.cpu().double() - wanted).abs().max() < LARGEST[dtype] * max(
                1.0, float(wanted.detach().abs().max())
            )


@pytest.mark.full
def test_a_million_tokens_forward() -> None:
    q, k, v, _ = (x.detach() for x in draw(1 << 20, (16, 4), 128, torch.bfloat16))
    out = moba_attention(q, k, v, block_size=512, top_k=3)
    assert out.isfinite().all()
    start = (1 << 20) - 64  # the last queries again, on their own
    part = moba_attention(q[start:], k, v, block_size=512, top_k=3, q_offset=start)
    assert (part - out[start:]).abs().max() < 1e-2


def test_a_block_that_everybody_chooses() -> None:
    """Its list is long enough to be split: exact, and the same bits every time."""
    q, k, v, grad = draw(16384, (2, 1), 64, torch.bfloat16)
    block_indices = select_blocks(q, block_means(k, block_size=128), block_size=128, top_k=3)
    block_indices[128:, :, 1] = 0
    block_indices[:, :, 2] = -1
    runs = []
    for _ in range(2):
        out = attend(q, k, v, block_indices, block_size=128)[0]
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.equal(got, again) for got, again in zip(*runs, strict=True))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    out = attend(*exact, block_indices.cpu(), block_size=128)[0]
    for got, want in zip(runs[0], (out, *torch.autograd.grad(out, exact, grad.cpu().double())), strict=True):
        assert (got.cpu().double() - want).abs().max() < LARGEST[q.dtype] * max(1.0, float(want.detach().abs().max()))


@pytest.mark.parametrize("tiles", [tiles for tiles in KEY_TILES if common.Tiles(*tiles).atomics])
def test_dq_by_atomics(tiles: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that tuning times: exact, also where a list is split; deterministic algorithms bring today's bits back."""
    q, k, v, grad = draw(16384, (2, 1), 128, torch.bfloat16)
    block_indices = select_blocks(q, block_means(k, block_size=128), block_size=128, top_k=3)
    block_indices[128:, :, 1] = 0
    block_indices[:, :, 2] = -1

    def gradients(chosen: tuple[Any, ...]) -> tuple[Tensor, ...]:
        monkeypatch.setattr(common, "tuned", lambda key, tokens: chosen if key.startswith("key_tiles") else None)
        return torch.autograd.grad(attend(q, k, v, block_indices, block_size=128)[0], (q, k, v), grad)

    in_order, by_atomics = gradients(tiles[:4]), gradients(tiles)
    assert not torch.equal(by_atomics[0], in_order[0])
    for got, want in zip(by_atomics, in_order, strict=True):
        assert (got - want).abs().max() < LARGEST[q.dtype] * max(1.0, float(want.abs().max()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        again = gradients(tiles)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got, want) for got, want in zip(again, in_order, strict=True))
    for head_dim, dtype in ((64, torch.bfloat16), (96, torch.bfloat16), (128, torch.float16)):
        drawn = draw(2048, (4, 2), head_dim, dtype)
        assert_equals_float64(*drawn, block_size=100, top_k=3, causal=True, cu_seqlens=cu(BORDERS))
        assert_equals_float64(*drawn, block_size=128, top_k=3, causal=False, cu_seqlens=None)
