"""MoBA against loops in float64, and the properties that no tolerance can hide."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neomoba_dist.model.kernels import gathered
from neomoba_dist.model.moba import attend, block_means, full_attention, moba_attention, route
from tests.reference import moba_loops

HEADS = {"MHA": (3, 3), "GQA": (4, 2), "MQA": (3, 1)}
DOCUMENTS = {
    "one": [0, 61],
    "four": [0, 0, 24, 25, 61],
    "seven": [0, 16, 16, 17, 40, 59, 61, 61],
}
TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.float64: (1e-12, 1e-12)}


def tensors(tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q [T, Hq, D], k, v [T, Hkv, D] and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(index < 3) for index, x in enumerate(drawn)]


def cu(borders: list[int]) -> Tensor:
    return torch.tensor(borders, dtype=torch.int32)


def assert_equals_loops(borders: list[int], heads: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    q, k, v, grad = tensors(borders[-1], heads, 8, dtype)
    impl = options.pop("impl", "auto")
    want, want_lse = moba_loops(q, k, v, borders=borders, **options)
    out, lse = moba_attention(q, k, v, cu_seqlens=cu(borders), impl=impl, return_lse=True, **options)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    want_grads = torch.autograd.grad(want, (q, k, v), grad.double())
    out_tolerance, grad_tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype
    assert (out - want).abs().max() <= out_tolerance
    assert (lse - want_lse).abs().max() <= out_tolerance
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got - expected).abs().max() <= grad_tolerance


@pytest.fixture(params=["gathered", "masked"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one way of computing: the choice between them depends on speed alone."""
    monkeypatch.setattr(gathered, "_cheapest_method", lambda *_: request.param)
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
            places = {"block_size": 3, "cu_seqlens": cu([0, 9, 11]), "causal": causal}
            return attend(q, k, v, route(q, means, top_k=2, **places), **places)

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
    routes = route(q, block_means(k, block_size=64), block_size=64, top_k=3, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = attend(*exact, routes, block_size=64, causal=causal, impl="reference")
    grads = torch.autograd.grad(out, (q, k, v), grad)
    want_grads = torch.autograd.grad(want, exact, grad.double())
    for got, expected in zip((out, *grads), (want, *want_grads), strict=True):
        error = (got.double() - expected).abs()
        assert error.max() < 4e-2
        assert error.mean() < 4e-4 * max(1.0, float(expected.detach().abs().mean()))


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


@pytest.mark.parametrize("block_size", [4, 16, 200])
def test_future_tokens_change_nothing(block_size: int) -> None:
    q, k, v, _ = tensors(150, (2, 1), 8, torch.float64)
    before = moba_attention(q, k, v, block_size=block_size, top_k=2)
    for border in (1, 17, 80, 149):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[border:] = 7 * x[border:].flip(0) + 1
        after = moba_attention(*changed, block_size=block_size, top_k=2)
        assert (after[:border] - before[:border]).abs().max() <= 1e-13
        assert (after[border:] - before[border:]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_unpacked(causal: bool) -> None:
    borders = [0, 70, 70, 71, 200]
    q, k, v, _ = tensors(200, (4, 2), 8, torch.float32)
    options = {"block_size": 16, "top_k": 3, "causal": causal}
    packed = moba_attention(q, k, v, cu_seqlens=cu(borders), **options)
    for start, stop in itertools.pairwise(borders):
        alone = moba_attention(q[start:stop], k[start:stop], v[start:stop], **options)
        assert torch.allclose(packed[start:stop], alone, atol=1e-6, rtol=0)


def test_permuting_documents_permutes_outputs() -> None:
    q, k, v, _ = tensors(200, (2, 2), 8, torch.float64)
    one, two = slice(0, 130), slice(130, 200)
    out = moba_attention(q, k, v, block_size=16, top_k=2, cu_seqlens=cu([0, 130, 200]))
    q, k, v = (torch.cat([x[two], x[one]]) for x in (q, k, v))
    swapped = moba_attention(q, k, v, block_size=16, top_k=2, cu_seqlens=cu([0, 70, 200]))
    assert torch.allclose(swapped, torch.cat([out[two], out[one]]), atol=1e-13, rtol=0)


def test_change_of_borders_in_place_is_seen() -> None:
    q, k, v, _ = tensors(96, (2, 2), 8, torch.float64)
    borders = cu([0, 40, 96])
    first = moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=borders)
    borders[1] = 60
    second = moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=borders)
    assert torch.equal(second, moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=cu([0, 60, 96])))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("causal", [True, False])
def test_sparse_differs_from_full_and_all_blocks_equal_it(causal: bool) -> None:
    q, k, v, grad = tensors(200, (4, 2), 8, torch.float32)
    borders = cu([0, 120, 200])
    full = full_attention(q, k, v, causal=causal, cu_seqlens=borders)
    sparse = moba_attention(q, k, v, block_size=16, top_k=3, causal=causal, cu_seqlens=borders)
    assert (sparse - full).abs().max() > 0.05
    for top_k in (8, 13):  # 8: all blocks of each document, known from the values only; 13: known from the shapes
        every = moba_attention(q, k, v, block_size=16, top_k=top_k, causal=causal, cu_seqlens=borders)
        assert torch.equal(every, full)
        grads = (torch.autograd.grad(x, (q, k, v), grad, retain_graph=True) for x in (every, full))
        assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


def test_top_1_is_the_own_block() -> None:
    q, k, v, _ = tensors(64, (2, 2), 8, torch.float64)
    out = moba_attention(q, k, v, block_size=16, top_k=1)
    blocks = full_attention(q, k, v, causal=True, cu_seqlens=cu([0, 16, 32, 48, 64]))
    assert torch.allclose(out, blocks, atol=1e-14, rtol=0)


def test_ties_go_to_the_higher_block() -> None:
    q = torch.ones(40, 1, 4)
    means = torch.ones(10, 1, 4)
    routes = route(q, means, block_size=4, top_k=3)
    assert routes[39, 0].tolist() == [9, 8, 7]
    assert route(q, means, block_size=4, top_k=3, causal=False)[0, 0].tolist() == [0, 9, 8]
    many = route(torch.ones(80, 1, 4), torch.ones(20, 1, 4), block_size=4, top_k=19)
    assert many[79, 0].tolist() == list(range(19, 0, -1))
    assert routes[5, 0].tolist() == [1, 0, -1]


def test_not_a_number_spreads_but_never_reaches_masked_blocks() -> None:
    q, k, v, _ = (x.detach() for x in tensors(96, (1, 1), 8, torch.float32))
    clean = moba_attention(q, k, v, block_size=16, top_k=2)
    poisoned = k.clone()
    poisoned[40] = torch.nan
    out = moba_attention(q, poisoned, v, block_size=16, top_k=2)
    assert torch.equal(out[:40].isnan(), torch.zeros_like(out[:40], dtype=torch.bool))
    assert torch.allclose(out[:32], clean[:32], atol=1e-6)
    assert out[40:].isnan().all()
    poisoned = q.clone()
    poisoned[50] = torch.nan
    out = moba_attention(poisoned, k, v, block_size=16, top_k=2)
    assert out[50].isnan().all()
    assert out.isnan().any(-1).sum() == 1
    routes = route(poisoned, block_means(k, block_size=16), block_size=16, top_k=3)
    assert routes[50, 0].max() == 3
    assert routes[50, 0].min() >= 0


def test_queries_with_an_offset_equal_the_whole() -> None:
    q, k, v, _ = tensors(100, (4, 2), 8, torch.float64)
    whole, lse = moba_attention(q, k, v, block_size=16, top_k=3, return_lse=True)
    for start, stop in ((0, 30), (30, 47), (47, 48), (48, 100)):
        part, part_lse = moba_attention(
            q[start:stop], k[:stop], v[:stop], block_size=16, top_k=3, q_offset=start, return_lse=True
        )
        assert (part - whole[start:stop]).abs().max() <= 1e-13
        assert (part_lse - lse[start:stop]).abs().max() <= 1e-13


def test_parts_over_split_keys_merge_to_the_whole() -> None:
    """What context parallelism does: each rank attends to the routed blocks that it holds, the parts merge by lse."""
    q, k, v, _ = tensors(128, (4, 2), 8, torch.float64)
    whole, whole_lse = moba_attention(q, k, v, block_size=16, top_k=3, return_lse=True)
    routes = route(q, block_means(k, block_size=16), block_size=16, top_k=3)
    parts = []
    for first, last in ((0, 4), (4, 8)):
        here = torch.where((routes >= first) & (routes < last), routes, -1)
        parts.append(attend(q, k, v, here, block_size=16))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts)
    assert (merged - whole).abs().max() <= 1e-13
    assert (lse - whole_lse).abs().max() <= 1e-13


def test_deterministic_and_the_same_on_two_threads() -> None:
    q, k, v, grad = tensors(600, (4, 2), 16, torch.float32)

    def run() -> tuple[Tensor, ...]:
        out = moba_attention(q, k, v, block_size=64, top_k=3)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    first, threads = run(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_one_head_is_split_among_threads() -> None:
    q, k, v, grad = tensors(1024, (2, 1), 16, torch.float64)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            out = moba_attention(q, k, v, block_size=64, top_k=3)
            results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
        finally:
            torch.set_num_threads(threads)
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-12


def test_compiles_without_a_break_and_without_recompiling() -> None:
    q, k, v, grad = tensors(200, (4, 2), 8, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
        return 2 * moba_attention(q, k, v, block_size=16, top_k=3, cu_seqlens=borders)

    for borders in ([0, 50, 200], [0, 90, 200], [0, 200, 200]):
        out = layer(q, k, v, cu(borders))
        want = 2 * moba_attention(q, k, v, block_size=16, top_k=3, cu_seqlens=cu(borders))
        assert torch.equal(out, want)
        grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, want))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count == 1


def test_inference_mode_and_strided_inputs() -> None:
    packed = torch.randn(96, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.unbind(1)
    with torch.inference_mode():
        strided = moba_attention(q, k, v, block_size=16, top_k=2)
    assert torch.equal(strided, moba_attention(*(x.contiguous() for x in (q, k, v)), block_size=16, top_k=2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_next_to_nothing(tokens: int) -> None:
    q, k, v, grad = tensors(tokens, (2, 1), 4, torch.float32)
    for borders in (None, cu([0, 0, tokens, tokens])):
        out = moba_attention(q, k, v, block_size=4, top_k=2, cu_seqlens=borders)
        assert out.shape == q.shape
        assert torch.allclose(out, v.expand_as(out))
        assert [g.shape for g in torch.autograd.grad(out, (q, k, v), grad)] == [q.shape, k.shape, v.shape]


BAD = {
    "block_size": {"block_size": 0},
    "top_k": {"top_k": 0},
    "gate": {"gate": "per_token"},
    "pooling": {"pooling": "median"},
    "impl": {"impl": "cuda"},
    "heads": {"k": torch.zeros(8, 3, 4), "v": torch.zeros(8, 3, 4)},
    "k, v": {"v": torch.zeros(8, 2, 5)},
    "head_dim": {name: torch.zeros(8, 4, 300) for name in "qkv"},
    "dtype": {"k": torch.zeros(8, 2, 4, dtype=torch.float64)},
    "cu_seqlens must not decrease": {"cu_seqlens": cu([0, 5, 3, 8])},
    "cu_seqlens must run from 0 to 8": {"cu_seqlens": cu([0, 5])},
    "cu_seqlens must be int32": {"cu_seqlens": torch.tensor([0, 8])},
    "cu_seqlens_k is needed": {"k": torch.zeros(9, 2, 4), "v": torch.zeros(9, 2, 4), "cu_seqlens": cu([0, 8])},
    "cu_seqlens_k needs cu_seqlens": {"cu_seqlens_k": cu([0, 8])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    arguments = {"q": torch.zeros(8, 4, 4), "k": torch.zeros(8, 2, 4), "v": torch.zeros(8, 2, 4)}
    with pytest.raises(ValueError, match=message):
        moba_attention(**{**arguments, "block_size": 4, "top_k": 2, **BAD[message]})


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
    forced=st.sampled_from(["gathered", "masked", None]),
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
            patch.setattr(gathered, "_cheapest_method", lambda *_: forced)
        for impl in ("torch", "reference"):
            out = moba_attention(q, k, v, cu_seqlens=cu(borders), impl=impl, **options)
            results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-11, rtol=1e-11)
