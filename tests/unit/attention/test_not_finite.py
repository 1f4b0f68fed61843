"""Numbers that are not finite reach the queries that see them, and no others.

A query of not-a-number spoils its own row. A key or value spoils the rows of queries that attend to it: of its own
document, causally, by MoBA's choice or window. Every way of computing agrees; the exception is torch's own full
attention of a single document, where a value also reaches earlier queries (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu import attend as gathered
from neomoba_dist.model.attention.kernels.reference import attend_chunked
from neomoba_dist.model.attention.moba import attend, block_means, full_attention, moba_attention, select_blocks
from neomoba_dist.model.attention.sliding_window import sliding_window_attention
from tests.moba_cases import cu, force_method, tensors

BORDERS = [0, 70, 96]
BAD_TOKEN = 40  # in the first document, within its third block of 16


def spoil(x: Tensor, value: float = torch.nan, where: tuple[Any, ...] = (BAD_TOKEN, 0, 3)) -> Tensor:
    spoilt = x.detach().clone()
    spoilt[where] = value
    return spoilt


def spoilt_rows(out: Tensor) -> Tensor:
    """bool [T, H]."""
    return ~out.isfinite().all(-1)


def seen_by(block_indices: Tensor, causal: bool) -> Tensor:
    """bool [T, H]: the queries whose block_indices hold the bad token, which is visible to them."""
    token = torch.arange(len(block_indices))
    own = (block_indices[..., 0] == 2) & ((token >= BAD_TOKEN) | (not causal))[:, None]
    return own | (block_indices[..., 1:] == 2).any(-1)


@pytest.fixture(params=["gathered", "few", "masked", "chosen", "chunked", "reference"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of computing; returns the `impl` of `attend`. Masks are left for gathering where keys are damaged."""
    if request.param in ("gathered", "few"):
        force_method(monkeypatch, request.param)
    elif request.param == "masked":
        monkeypatch.setattr(gathered, "NS_PER_MASKED_PAIR", 0.0)
    elif request.param == "chunked":
        monkeypatch.setattr(gathered, "attend_cpu", attend_chunked)
    return "reference" if request.param == "reference" else "torch"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_reach_those_that_attend_to_them(impl: str, name: str, causal: bool, value: float) -> None:
    q, k, v, _ = (x.detach() for x in tensors(96, (4, 2), 8, torch.float32))
    geometry = {"block_size": 16, "causal": causal, "cu_seqlens": cu(BORDERS)}
    block_indices = select_blocks(q, block_means(k, block_size=16, cu_seqlens=cu(BORDERS)), top_k=2, **geometry)
    expected = seen_by(block_indices, causal) & torch.tensor([True, True, False, False])  # KV head 0 has the first two
    clean, _ = attend(q, k, v, block_indices, impl=impl, **geometry)
    damaged = {"k": k, "v": v, name: spoil(k if name == "k" else v, value)}
    out, _ = attend(q, damaged["k"], damaged["v"], block_indices, impl=impl, **geometry)
    if name == "v" or value != torch.inf:  # an infinite key may also weigh nothing
        assert torch.equal(spoilt_rows(out), expected)
    assert not spoilt_rows(out)[~expected].any()
    assert (out[~expected] - clean[~expected]).abs().max() <= 1e-6
    assert expected.any()
    assert not expected[:70, :2].all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_spoils_its_own_row(impl: str, causal: bool) -> None:
    q, k, v, _ = (x.detach() for x in tensors(96, (4, 2), 8, torch.float32))
    geometry = {"block_size": 16, "causal": causal, "cu_seqlens": cu(BORDERS)}
    means = block_means(k, block_size=16, cu_seqlens=cu(BORDERS))
    q = spoil(q)
    block_indices = select_blocks(q, means, top_k=2, **geometry)
    out, _ = attend(q, k, v, block_indices, impl=impl, **geometry)
    assert spoilt_rows(out).nonzero().tolist() == [[BAD_TOKEN, 0]]
    assert block_indices[BAD_TOKEN].min() >= 0  # it chooses blocks all the same, none that is masked
    assert block_indices[BAD_TOKEN].max() <= (2 if causal else 4)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_documents_keep_their_outputs_and_gradients(name: str) -> None:
    q, k, v, grad = tensors(96, (4, 2), 8, torch.float64)
    options = {"block_size": 16, "top_k": 2, "cu_seqlens": cu(BORDERS)}
    runs = []
    for bad in (False, True):
        leaves = {"q": q, "k": k, "v": v}
        if bad:
            leaves[name] = spoil(leaves[name]).requires_grad_()
        out = moba_attention(**leaves, **options)
        grads = torch.autograd.grad(out, tuple(leaves.values()), grad)
        runs.append([x[70:] for x in (out, *grads)])
    for got, want in zip(*runs, strict=True):
        assert torch.allclose(got, want, atol=1e-12, rtol=0)


def test_a_damaged_key_is_chosen_by_all_later_queries() -> None:
    """Its block's mean is not a number, which ranks first: the damage shows instead of vanishing."""
    q, k, v, _ = (x.detach() for x in tensors(96, (1, 1), 8, torch.float32))
    out = moba_attention(q, spoil(k), v, block_size=16, top_k=2)
    assert spoilt_rows(out)[:, 0].tolist() == [token >= BAD_TOKEN for token in range(96)]


@pytest.mark.parametrize("name", ["k", "v"])
def test_packed_full_attention(name: str) -> None:
    q, k, v, _ = (x.detach() for x in tensors(96, (4, 2), 8, torch.float32))
    damaged = {"q": q, "k": k, "v": v, name: spoil(k if name == "k" else v)}
    out = full_attention(**damaged, causal=True, cu_seqlens=cu(BORDERS))
    expected = (torch.arange(96) >= BAD_TOKEN) & (torch.arange(96) < 70)
    assert torch.equal(spoilt_rows(out)[:, :2], expected[:, None].expand(-1, 2))
    assert not spoilt_rows(out)[:, 2:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_sliding_windows(name: str, causal: bool) -> None:
    q, k, v, grad = tensors(96, (4, 2), 8, torch.float64)
    leaves = {"q": q, "k": k, "v": v}
    leaves[name] = spoil(leaves[name]).requires_grad_()
    out = sliding_window_attention(**leaves, window=5, global_tokens=0, causal=causal, cu_seqlens=cu(BORDERS))
    distance = torch.arange(96) - BAD_TOKEN
    near = (distance == 0) if name == "q" else (distance.abs() < 5) & ((distance >= 0) | (not causal))
    heads = torch.tensor([True, name != "q", False, False])
    assert torch.equal(spoilt_rows(out), near[:, None] & heads)
    grads = torch.autograd.grad(out, tuple(leaves.values()), grad)
    assert all(x[70:].isfinite().all() for x in grads)
