"""MoBA against loops in float64 and against the dense mask: outputs, logsumexp and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu import attend as gathered
from neomoba_dist.model.attention.moba import attend, block_means, moba_attention, select_blocks
from tests.moba_cases import DOCUMENTS, HEADS, cu, force_method, tensors
from tests.reference import attention_loops, keys_of_moba

TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.float64: (1e-12, 1e-12)}


def assert_equals_loops(borders: list[int], heads: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    q, k, v, grad = tensors(borders[-1], heads, 8, dtype)
    impl = options.pop("impl", "auto")
    want, want_lse = attention_loops(q, k, v, keys_of_moba(q, k, borders=borders, **options))
    out, lse = moba_attention(q, k, v, cu_seqlens=cu(borders), impl=impl, return_lse=True, **options)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    want_grads = torch.autograd.grad(want, (q, k, v), grad.double())
    out_tolerance, grad_tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype
    assert (out - want).abs().max() <= out_tolerance
    assert (lse - want_lse).abs().max() <= out_tolerance
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got - expected).abs().max() <= grad_tolerance


@pytest.fixture(params=["gathered", "few", "masked"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of computing a sparse document."""
    force_method(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "block_size", "top_k"), [("GQA", 8, 3), ("MHA", 7, 2), ("MQA", 16, 2)])
def test_every_method_equals_loops(
    method: str, heads: str, block_size: int, top_k: int, documents: str, causal: bool
) -> None:
    options = {"block_size": block_size, "top_k": top_k, "causal": causal}
    assert_equals_loops(DOCUMENTS[documents], HEADS[heads], torch.float64, **options)
    assert_equals_loops(DOCUMENTS[documents], HEADS[heads], torch.float32, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("block_size", "top_k"), [(1, 3), (8, 1), (5, 4), (8, 40), (100, 1), (100, 2)])
def test_extreme_blocks_equal_loops(impl: str, block_size: int, top_k: int, causal: bool) -> None:
    options = {"block_size": block_size, "top_k": top_k, "causal": causal, "impl": impl}
    assert_equals_loops(DOCUMENTS["four"], HEADS["GQA"], torch.float32, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gate", ["per_head", "kv_group"])
@pytest.mark.parametrize("pooling", ["mean", "max", "minmax", "representative"])
def test_gates_and_poolings_equal_loops(method: str, gate: str, pooling: str, causal: bool) -> None:
    options = {"block_size": 6, "top_k": 3, "causal": causal, "gate": gate, "pooling": pooling}
    assert_equals_loops(DOCUMENTS["four"], HEADS["GQA"], torch.float32, **options)


@pytest.mark.full
@pytest.mark.parametrize("pooling", ["mean", "max", "minmax", "representative"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
def test_whole_grid_equals_loops(heads: str, documents: str, pooling: str) -> None:
    options = itertools.product((1, 7, 16, 100), (1, 3, 40), (True, False), ("per_head", "kv_group"))
    for (block_size, top_k, causal, gate), dtype in zip(
        options, itertools.cycle([*TOLERANCE, *reversed(TOLERANCE)]), strict=False
    ):
        chosen = {"block_size": block_size, "top_k": top_k, "causal": causal, "gate": gate, "pooling": pooling}
        assert_equals_loops(DOCUMENTS[documents], HEADS[heads], dtype, **chosen)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [128, 160, 256, 300, 509])
def test_tiled_blocks_equal_the_dense_mask(method: str, block_size: int, causal: bool) -> None:
    q, k, v, grad = tensors(1100, (2, 1), 16, torch.float64)
    options = {"block_size": block_size, "top_k": 2, "causal": causal, "cu_seqlens": cu([0, 700, 700, 1100])}
    results = []
    for impl in ("torch", "reference"):
        out, lse = moba_attention(q, k, v, impl=impl, return_lse=True, **options)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), grad)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-12


def test_gradcheck_through_output_and_logsumexp() -> None:
    q, k, v, _ = tensors(11, (2, 1), 3, torch.float64)
    for causal in (True, False):

        def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Any:
            means = block_means(k, block_size=3, cu_seqlens=cu([0, 9, 11]))
            geometry = {"block_size": 3, "cu_seqlens": cu([0, 9, 11]), "causal": causal}
            return attend(q, k, v, select_blocks(q, means, top_k=2, **geometry), **geometry)

        assert torch.autograd.gradcheck(attention, (q, k, v))


def test_gradient_of_the_logsumexp_equals_the_reference(method: str) -> None:
    q, k, v, grad = tensors(80, (4, 2), 8, torch.float64)
    grads = []
    for impl in ("torch", "reference"):
        out, lse = moba_attention(q, k, v, block_size=8, top_k=3, impl=impl, return_lse=True)
        grads.append(torch.autograd.grad((out * grad).sum() + lse.square().sum(), (q, k, v)))
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_as_good_as_its_rounding(causal: bool) -> None:
    q, k, v, grad = tensors(700, (4, 2), 64, torch.bfloat16)
    options = {"block_size": 64, "top_k": 3, "causal": causal}
    out = moba_attention(q, k, v, **options)
    block_indices = select_blocks(q, block_means(k, block_size=64), block_size=64, top_k=3, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = attend(*exact, block_indices, block_size=64, causal=causal, impl="reference")
    grads = torch.autograd.grad(out, (q, k, v), grad)
    want_grads = torch.autograd.grad(want, exact, grad.double())
    for got, expected in zip((out, *grads), (want, *want_grads), strict=True):
        error = (got.double() - expected).abs()
        assert error.max() < 4e-2
        assert error.mean() < 4e-4


def test_large_logits_take_the_running_maximum() -> None:
    q, k, v, grad = tensors(300, (2, 2), 16, torch.float64)
    q, k = (x.detach().mul(20.0).requires_grad_() for x in (q, k))
    results = []
    for impl in ("torch", "reference"):
        out, lse = moba_attention(q, k, v, block_size=64, top_k=2, impl=impl, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), grad)))
    assert results[0][1].max() > 300  # exp2 of such logits without a maximum would overflow in float32
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.detach().abs().max()))


@pytest.mark.parametrize(("block_size", "top_k"), [(16, 2), (16, 4), (64, 3)])
def test_the_first_queries_may_run_full(block_size: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that see all keys before them, where that is faster: two pieces of one document."""
    q, k, v, grad = tensors(400, (4, 2), 16, torch.float64)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": cu([0, 300, 310, 400])}
    monkeypatch.setattr(gathered, "_prefers_flash", lambda *_: True)
    pieces: list[Any] = []
    documents = gathered.documents
    monkeypatch.setattr(gathered, "documents", lambda *a, **b: pieces.append(documents(*a, **b)) or pieces[-1])
    results = []
    for impl in ("torch", "reference"):
        out = moba_attention(q, k, v, impl=impl, **options)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-12
    first = pieces[0][0]
    assert (first.method, first.num_queries, first.num_keys) == ("full", block_size * top_k, block_size * top_k)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dim=st.integers(1, 20),
    block_size=st.integers(1, 45),
    top_k=st.integers(1, 12),
    causal=st.booleans(),
    gate=st.sampled_from(["per_head", "kv_group"]),
    pooling=st.sampled_from(["mean", "max", "minmax", "representative"]),
    scale=st.sampled_from([1.0, 30.0]),
    forced=st.sampled_from(["gathered", "few", "masked", None]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_dense_mask(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    top_k: int,
    causal: bool,
    gate: str,
    pooling: str,
    scale: float,
    forced: str | None,
    seed: int,
) -> None:
    borders = [0, *itertools.accumulate(lengths)]
    q, k, v, grad = tensors(borders[-1], heads, head_dim, torch.float64, seed)
    q = q.detach().mul(scale).requires_grad_()
    options = {"block_size": block_size, "top_k": top_k, "causal": causal, "gate": gate, "pooling": pooling}
    results = []
    with pytest.MonkeyPatch.context() as patch:
        if forced:
            force_method(patch, forced)
        for impl in ("torch", "reference"):
            out = moba_attention(q, k, v, cu_seqlens=cu(borders), impl=impl, **options)
            results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-11, rtol=1e-11)


def test_few_queries_read_their_chosen_blocks_only() -> None:
    """As in decoding: keys of other blocks may hold anything, and nothing changes by a bit."""
    q, k, v, _ = (x.detach() for x in tensors(1024, HEADS["GQA"], 8, torch.float32))
    q = q[-1:]
    geometry = {"block_size": 16, "cu_seqlens": cu([0, 1]), "cu_seqlens_k": cu([0, 1024]), "q_offset": 1023}
    block_indices = select_blocks(q, block_means(k, block_size=16), top_k=3, num_keys=1024, **geometry)
    out, lse = attend(q, k, v, block_indices, **geometry)
    expected, expected_lse = attend(q, k, v, block_indices, impl="reference", **geometry)
    assert (out - expected).abs().max() <= 2e-6
    assert (lse - expected_lse).abs().max() <= 2e-6
    unread = torch.ones(64, dtype=torch.bool)
    unread[block_indices.flatten().long()] = False
    assert unread.any()
    k, v = (x.masked_fill(unread.repeat_interleave(16)[:, None, None], torch.nan) for x in (k, v))
    assert torch.equal(attend(q, k, v, block_indices, **geometry)[0], out)
