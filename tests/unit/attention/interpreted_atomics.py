"""dq by atomics, in Triton's interpreter. Run by test_moba_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.layout import Geometry, Problem, make_layout
from neomoba_dist.model.attention.kernels.triton import common
from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward
from neomoba_dist.model.attention.kernels.triton.common import Tiles
from neomoba_dist.model.attention.kernels.triton.forward import attend_triton
from neomoba_dist.model.attention.moba import attend, block_means, moba_attention, select_blocks
from tests.unit.attention.interpreted_triton import PACKED, assert_equals_reference, cu, draw

EXACT = Tiles(16, 16, 4, 1)
FAST = EXACT._replace(atomics=True)


@pytest.fixture(autouse=True)
def tuned_table(monkeypatch: pytest.MonkeyPatch, short_index_tiles: None) -> None:
    """A card on which dq by atomics was the fastest."""
    monkeypatch.setattr(common, "tuned", lambda key, tokens: list(FAST) if key.startswith("key_tiles") else None)


def problem_of(block_size: int = 16) -> tuple[Problem, Tensor]:
    """64 queries, four heads over two; and a gradient."""
    q, k, v, grad = (x.detach() for x in draw(64, 64, (4, 2), 16, torch.float32))
    layout = make_layout(64, 64, block_size, None, None, None, q.device)
    selected = select_blocks(q, block_means(k, block_size=block_size), block_size=block_size, top_k=3)
    return Problem(q, k, v, selected, layout, True), grad


@pytest.mark.parametrize(
    ("borders", "heads", "block_size", "top_k", "causal", "gate"),
    [
        (PACKED, (4, 2), 16, 3, True, "per_head"),
        (PACKED, (4, 2), 20, 3, False, "kv_group"),
        (None, (2, 2), 7, 2, False, "per_head"),
        (None, (3, 1), 32, 1, True, "per_head"),
    ],
)
def test_exact(borders: Any, heads: Any, block_size: int, top_k: int, causal: bool, gate: str) -> None:
    """Also with a gradient of the logsumexp."""
    options = {"block_size": block_size, "top_k": top_k, "causal": causal, "gate": gate, "cu_seqlens": cu(borders)}
    assert_equals_reference(*draw(64, 64, heads, 16, torch.float32), **options)


@pytest.mark.full
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("borders", [None, PACKED])
def test_grid(borders: list[int] | None, heads: tuple[int, int], causal: bool) -> None:
    for (block_size, top_k), gate in itertools.product(((16, 3), (7, 2), (32, 1)), ("per_head", "kv_group")):
        test_exact(borders, heads, block_size, top_k, causal, gate)


def test_half_precision_and_padded_heads() -> None:
    assert_equals_reference(*draw(40, 40, (2, 1), 12, torch.float16), block_size=16, top_k=3)


def test_offsets_and_own_keys() -> None:
    options = {"cu_seqlens": cu([0, 10, 40]), "cu_seqlens_k": cu([0, 20, 60]), "q_offset": torch.tensor([10, 5])}
    assert_equals_reference(*draw(40, 60, (2, 1), 16, torch.float32), block_size=8, top_k=2, **options)


def test_current_blocks_that_were_not_chosen() -> None:
    """Some queries have no keys left: their dq is zero."""
    q, k, v, grad = draw(64, 64, (2, 1), 16, torch.float32)
    block_indices = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=2)
    here = torch.where(block_indices == 1, block_indices, -1)
    got, want = (
        torch.autograd.grad(attend(q, k, v, here, block_size=16, impl=impl)[0], (q, k, v), grad)
        for impl in ("triton", "reference")
    )
    assert all((one - other).abs().max() <= 1e-5 for one, other in zip(got, want, strict=True))
    alone = (here < 0).all(-1)
    assert alone.any()
    assert (got[0][alone] == 0).all()


def test_spans_of_keys() -> None:
    """One of one key, one empty, one longer than a tile, keys in none."""
    spans = torch.tensor([(0, 7), (7, 1), (8, 0), (10, 20), (30, 33)])
    q, k, v, grad = draw(37, 64, (2, 1), 16, torch.float32)
    generator = torch.Generator().manual_seed(1)
    block_indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(37 * 2)])
    block_indices = block_indices.view(37, 2, 3).int()
    results = []
    for impl in ("triton", "torch"):
        out, *_ = ops.attend(q, k, v, block_indices, *Geometry(33, False, spans=spans), impl)
        results.append(torch.autograd.grad(out, (q, k, v), grad))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("gate", ["per_head", "kv_group"])
def test_long_lists(gate: str) -> None:
    """Programs of both launches add to dq."""
    problem, grad = problem_of()
    q, k, v, *_ = problem
    block_indices = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=3, gate=gate)
    block_indices[16:, :, 1] = 0
    block_indices[:, :, 2] = -1
    problem = problem._replace(block_indices=block_indices)
    out, lse, index = attend_triton(problem)
    got = attend_triton_backward(problem, out, lse, grad, None, index, key_tiles=FAST, long_list=23)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(attend(*leaves, block_indices, block_size=16, impl="reference")[0], leaves, grad)
    assert all((one - other).abs().max() <= 1e-5 for one, other in zip(got, want, strict=True))


def test_keys_that_do_not_exist_weigh_nothing() -> None:
    """Where all logits are about -100, a logit of 0 would weigh more than float32 holds."""
    q, k, v, grad = draw(44, 44, (1, 1), 16, torch.float32)
    with torch.no_grad():
        q.mul_(0.01).add_(5.0)
        k.mul_(0.01).sub_(5.0)
    results = []
    for impl in ("triton", "reference"):
        out, lse = moba_attention(q, k, v, block_size=20, top_k=2, causal=False, impl=impl, return_lse=True)
        assert lse.max() < -90
        results.append(torch.autograd.grad(out, (q, k, v), grad))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("damaged", [10, 15])
def test_damage_stays_in_its_document(damaged: int) -> None:
    """A key of the first document, whose last tile reaches into the second, and one of the second; heads are padded."""
    q, k, v, grad = draw(24, 24, (1, 1), 12, torch.float32)
    wrong = k.detach().clone().index_fill_(0, torch.tensor([damaged]), torch.nan).requires_grad_()
    runs = []
    for keys in (k, wrong):
        out = moba_attention(q, keys, v, block_size=8, top_k=2, cu_seqlens=cu([0, 12, 24]), impl="triton")
        runs.append(torch.autograd.grad(out, (q, keys, v), grad))
    other = slice(12, 24) if damaged < 12 else slice(12)
    for want, got in zip(*runs, strict=True):
        assert torch.equal(got[other], want[other])
    assert not runs[1][0][damaged].isfinite().any()


def test_deterministic_algorithms_overrule_the_table() -> None:
    """Also tiles that are given by name; the order of today has its bits."""
    problem, grad = problem_of()
    out, lse, index = attend_triton(problem)

    def gradients(key_tiles: Tiles | None) -> tuple[Tensor, ...]:
        return attend_triton_backward(problem, out, lse, grad, None, index, key_tiles=key_tiles)

    exact, fast = gradients(EXACT), gradients(None)
    assert not torch.equal(fast[0], exact[0])  # another order
    assert (fast[0] - exact[0]).abs().max() <= 1e-6
    torch.use_deterministic_algorithms(True)
    try:
        for given in (None, FAST):
            assert all(torch.equal(got, want) for got, want in zip(gradients(given), exact, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
