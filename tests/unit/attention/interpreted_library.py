"""MoBA by a library with a plain pair of functions in its place. Run by test_moba_triton.py, TRITON_INTERPRET=1.

The pair has the libraries' signatures and leaves what they leave undefined as not a number (varlen_reference.py). In
float64 rows move in plain torch; in float32 by the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neomoba_dist.model.attention.kernels import choice, ops
from neomoba_dist.model.attention.kernels.choice import MobaCall, moba_kernel
from neomoba_dist.model.attention.kernels.layout import Geometry, Problem, make_layout
from neomoba_dist.model.attention.kernels.library.moba import TRITON, Movers, attend_library, attend_library_backward
from neomoba_dist.model.attention.kernels.library.rows import Routes
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from neomoba_dist.model.attention.moba import attend, block_means, moba_attention, place_blocks, select_blocks
from tests.unit.attention.varlen_reference import REFERENCE

PACKED = [0, 0, 20, 21, 64, 64]


def draw(heads: tuple[int, int], dtype: torch.dtype, tokens: int = 64, head_dim: int = 16) -> list[Tensor]:
    """q, k, v that require a gradient, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads[0], head_dim), *[(tokens, heads[1], head_dim)] * 2, (tokens, heads[0], head_dim)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.requires_grad_(i < 3) for i, x in enumerate(drawn)]


def cu(borders: list[int] | None) -> Tensor | None:
    return None if borders is None else torch.tensor(borders, dtype=torch.int32)


def rows_of(routes: Routes) -> Tensor:
    """Row of every entry of the group's heads, int64 [T, H, C], and -1 where there is none."""
    slots, indices = routes.slots, routes.block_indices[:, :, 1:]
    lists = torch.arange(slots.shape[1])[:, None]
    row = slots + routes.shift[lists, indices.clamp(min=0).long()]
    row = torch.where(slots < 0, -1, row * routes.heads_per_row).repeat_interleave(routes.heads_per_row, 1)
    member = torch.arange(routes.all_heads) % routes.heads_per_row
    return torch.where(row < 0, -1, row + member[:, None])[:, routes.heads.start : routes.heads.stop]


def plain_gather(q: Tensor, routes: Routes, *more: Tensor) -> tuple[Tensor, ...]:
    row = rows_of(routes)
    assert sorted(row[row >= 0].tolist()) == list(range(int(routes.borders[-1])))
    t, head, _ = (row >= 0).nonzero().T
    head += routes.heads.start
    found = []
    for x in (q, *more):
        rows = x.new_full((routes.rows, *x.shape[2:]), torch.nan)
        rows[row[row >= 0]] = x[t, head]
        found.append(rows[:, None] if x.dim() == 3 else rows[None])
    return tuple(found)


def plain_merge(
    own_out: Tensor,
    own_lse: Tensor,
    routes: Routes,
    part: Tensor | None,
    part_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    heads = slice(routes.heads.start, routes.heads.stop)
    here = routes.block_indices[:, :, 0].repeat_interleave(routes.heads_per_row, 1)[:, heads] >= 0
    outs, lses = [own_out], [own_lse.T.masked_fill(~here, -torch.inf)]
    if part is not None and part_lse is not None:
        for row in rows_of(routes).unbind(2):
            outs.append(part[row, 0].masked_fill((row < 0)[..., None], 0))
            lses.append(part_lse[0, row].masked_fill(row < 0, -torch.inf))
    lse[:, heads] = torch.stack(lses).logsumexp(0)
    weights = (torch.stack(lses) - lse[:, heads].masked_fill(lse[:, heads] == -torch.inf, 0)).exp()
    out[:, heads] = (torch.stack(outs) * weights[..., None]).sum(0)


def plain_scatter(own_dq: Tensor, dq_rows: Tensor, routes: Routes, dq: Tensor) -> None:
    for row in rows_of(routes).unbind(2):
        own_dq = own_dq + dq_rows[row, 0].masked_fill((row < 0)[..., None], 0)
    dq[:, routes.heads.start : routes.heads.stop] = own_dq


PLAIN = Movers(plain_gather, plain_merge, plain_scatter)
FORMS = [(torch.float64, PLAIN, 1e-12), (torch.float32, TRITON, 1e-5)]


def assert_equals_reference(
    drawn: list[Tensor], block_indices: Tensor, options: dict[str, Any], movers: Movers, tolerance: float
) -> None:
    """Output, logsumexp and all gradients, which are not zero."""
    q, k, v, grad = drawn
    want, want_lse = attend(q, k, v, block_indices, impl="reference", **options)
    expected = (want, want_lse, *torch.autograd.grad(want, (q, k, v), grad))
    layout = make_layout(len(q), len(k), options["block_size"], options["cu_seqlens"], None, None, q.device)
    problem = Problem(q.detach(), k.detach(), v.detach(), block_indices, layout, options["causal"])
    runs = []
    for groups in dict.fromkeys((1, k.shape[1])):
        out, lse, index = attend_library(problem, REFERENCE, movers, groups)
        gradients = attend_library_backward(problem, out, lse, grad, index, REFERENCE, movers, groups)
        runs.append((out, lse, *gradients))
    for got, wanted in zip(runs[0], expected, strict=True):
        assert got.dtype == wanted.dtype
        assert wanted.any()
        nothing = (wanted == -torch.inf) & (got == -torch.inf)  # the logsumexp of a query without keys
        assert (got - wanted).masked_fill(nothing, 0).abs().max() <= tolerance
    for got, wanted in zip(runs[-1], runs[0], strict=True):  # one KV head at a time
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("short_index_tiles")
@pytest.mark.parametrize(("dtype", "movers", "tolerance"), FORMS)
@pytest.mark.parametrize("borders", [None, PACKED])
@pytest.mark.parametrize(("heads", "gate"), [((4, 2), "per_head"), ((4, 2), "kv_group"), ((2, 2), "per_head")])
def test_grid(
    heads: tuple[int, int], gate: str, borders: list[int] | None, dtype: torch.dtype, movers: Movers, tolerance: float
) -> None:
    drawn = draw(heads, dtype)
    for size, top_k, causal in ((16, 3, True), (7, 2, False), (32, 1, True), (8, 4, False)):
        options: dict[str, Any] = {"block_size": size, "causal": causal, "cu_seqlens": cu(borders)}
        means = block_means(drawn[1], block_size=size, cu_seqlens=cu(borders))
        block_indices = select_blocks(drawn[0], means, top_k=top_k, gate=gate, **options)
        assert_equals_reference(drawn, block_indices, options, movers, tolerance)


@pytest.mark.parametrize(("dtype", "movers", "tolerance"), FORMS)
@pytest.mark.parametrize("kept", ["none", "one", "others"])
def test_empty_routes(kept: str, dtype: torch.dtype, movers: Movers, tolerance: float) -> None:
    """No query chose another block; all chose the same; some queries have no current block, some nothing at all."""
    drawn = draw((2, 1), dtype)
    options: dict[str, Any] = {"block_size": 16, "causal": True, "cu_seqlens": None}
    block_indices = select_blocks(drawn[0], block_means(drawn[1], block_size=16), top_k=3, **options)
    if kept == "none":
        block_indices[:, :, 1:] = -1
    elif kept == "one":
        block_indices = block_indices.masked_fill((block_indices != 0) & (torch.arange(3) > 0), -1)
    else:
        block_indices = block_indices.masked_fill(torch.arange(3) == 0, -1)
        assert (block_indices[:16] == -1).all()
    assert_equals_reference(drawn, block_indices, options, movers, tolerance)


def test_what_follows_the_last_row_is_a_number() -> None:
    """A library's last tile may read it: zero times not-a-number would reach the gradients of keys."""
    q, k, *_ = (x.detach() for x in draw((2, 1), torch.float32))
    options: dict[str, Any] = {"block_size": 16, "causal": True, "cu_seqlens": None}
    block_indices = select_blocks(q, block_means(k, block_size=16), top_k=3, **options)
    seen: list[Tensor] = []

    def gather(*args: Tensor) -> tuple[Tensor, ...]:
        found = TRITON.gather(*args)
        assert len(found[0]) > args[1].borders[-1]  # type: ignore[attr-defined]
        seen.extend(found)
        return found

    layout = make_layout(64, 64, 16, None, None, None, q.device)
    problem = Problem(q, k, k, block_indices, layout, True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        out, lse, index = attend_library(problem, REFERENCE, TRITON._replace(gather=gather))
        attend_library_backward(problem, out, lse, q, index, REFERENCE, TRITON._replace(gather=gather))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 5
    assert all(rows.isfinite().all() for rows in seen)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> str:
    """A library by the name of one that takes any call on this machine."""
    monkeypatch.setitem(LIBRARIES, "flash_attn_4", REFERENCE)
    monkeypatch.setitem(choice.MOBA, "flash_attn_4", lambda call: call.ordinary and not call.lse_gradient)
    return "flash_attn_4"


@pytest.mark.usefixtures("short_index_tiles")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_through_moba_attention(stand_in: str, known: bool, causal: bool) -> None:
    """With what is known of the micro-batch; without it, also a gradient of the logsumexp, which libraries refuse."""
    q, k, v, grad = draw((4, 2), torch.float32)
    borders = cu(PACKED)
    assert borders is not None
    placed = None
    if known:
        placed = place_blocks(borders, 64, block_size=8, head_dim=16, dtype=torch.float32, impl=stand_in)
        assert placed.borders is not None
        assert placed.borders[-1] == 64
    options: dict[str, Any] = {"block_size": 8, "top_k": 3, "causal": causal, "cu_seqlens": borders}
    results = []
    for impl, place in ((stand_in, placed), ("reference", None)):
        out, lse = moba_attention(q, k, v, impl=impl, placed=place, return_lse=True, **options)
        loss = (out * grad).sum() + (0 if known else lse.sin().sum())
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5


def test_shapes_are_those_that_compiled_graphs_expect(stand_in: str) -> None:
    q, k, v, _ = (x.detach() for x in draw((4, 2), torch.float32))
    selected = select_blocks(q, block_means(k, block_size=8), block_size=8, top_k=3)
    operands = (q, k, v, selected, *Geometry(8, True), stand_in)
    with FakeTensorMode() as fake:
        promised = ops.attend(*(fake.from_tensor(x) if isinstance(x, Tensor) else x for x in operands))
    assert [x.shape for x in ops.attend(*operands)] == [x.shape for x in promised]


def test_what_a_library_does_not_take_goes_to_triton(stand_in: str) -> None:
    call = MobaCall(torch.device("cpu"), torch.float32, 16)
    assert moba_kernel(call, stand_in) == stand_in
    assert moba_kernel(call._replace(ordinary=False), stand_in) == "triton"
    assert moba_kernel(call._replace(lse_gradient=True), stand_in) == "triton"
    with pytest.raises(ValueError, match="flash_attn_2"):
        moba_kernel(call, "flash_attn_2")


def test_bits_repeat() -> None:
    drawn = [x.detach() for x in draw((2, 1), torch.float32)]
    q, k, v, grad = drawn
    layout = make_layout(64, 64, 16, None, None, None, q.device)
    selected = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=3)
    problem = Problem(q, k, v, selected, layout, True)
    runs = []
    for keep in (True, False):  # the index of the forward pass, and one made again
        out, lse, index = attend_library(problem, REFERENCE)
        kept = index if keep else None
        runs.append((out, lse, *attend_library_backward(problem, out, lse, grad, kept, REFERENCE)))
    assert all(torch.equal(got, want) for got, want in zip(*runs, strict=True))
