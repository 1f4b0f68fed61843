"""How MoBA runs: threads, compilation, inference mode, next to no tokens, and one line for every bad argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from neomoba_dist.model.attention import moba
from neomoba_dist.model.attention.kernels import ops, reference
from neomoba_dist.model.attention.kernels.layout import Geometry
from neomoba_dist.model.attention.moba import moba_attention
from tests.moba_cases import cu, tensors


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


def run_in_chunks(patch: pytest.MonkeyPatch, logits: int) -> None:
    patch.setattr(reference, "LOGITS_PER_CHUNK", logits)
    patch.setattr(ops, "attend_cpu", reference.attend_chunked)
    patch.setattr(ops, "attend_cpu_backward", reference.attend_chunked_backward)


@pytest.mark.parametrize("chunked", [False, True])
def test_results_lie_in_memory_as_compiled_graphs_expect(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the strides of the inputs."""
    if chunked:
        run_in_chunks(monkeypatch, 2 * 2 * 20)
    q, k, v, grad = (
        torch.randn(heads, 20, 4, generator=torch.Generator().manual_seed(heads)).transpose(0, 1)
        for heads in (2, 1, 1, 2)
    )
    block_indices = moba.select_blocks(q, moba.block_means(k, block_size=4), block_size=4, top_k=2)
    rest = (*Geometry(4, True), "torch")
    inputs = (q, k, v, block_indices, *rest)
    found = torch.ops.neomoba.attend(*inputs)
    for operator, arguments in (
        (torch.ops.neomoba.attend, inputs),
        (torch.ops.neomoba.attend_backward, (grad, None, *found, q, k, v, block_indices, *rest)),
    ):
        with FakeTensorMode() as fake:
            promised = operator(*(fake.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        for one, other in zip(operator(*arguments), promised, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_chunks_of_the_dense_mask_equal_the_gathered_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs in float64, here inside the operators of the CPU."""
    q, k, v, grad = tensors(80, (4, 2), 8, torch.float64)
    results = []
    for chunked in (False, True):
        if chunked:
            run_in_chunks(monkeypatch, 32 * 4 * 80)
        out, lse = moba_attention(q, k, v, block_size=8, top_k=3, return_lse=True, cu_seqlens=cu([0, 50, 80]))
        results.append((out, lse, *torch.autograd.grad((out * grad).sum() + lse.sin().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-12


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
    "q_offset must be an int of at least 0": {"q_offset": -3},
    "q_offset must be an int of at least 0 or a tensor": {"q_offset": 1.5},
    r"q_offset must be integers \[1\], got torch.float32": {"q_offset": torch.zeros(1)},
    r"q_offset must be integers \[2\], got torch.int64 \[1\]": {
        "cu_seqlens": cu([0, 3, 8]),
        "q_offset": torch.zeros(1, dtype=torch.int64),
    },
    "q_offset must not be negative, got -1": {"cu_seqlens": cu([0, 3, 8]), "q_offset": torch.tensor([4, -1])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    arguments = {"q": torch.zeros(8, 4, 4), "k": torch.zeros(8, 2, 4), "v": torch.zeros(8, 2, 4)}
    with pytest.raises(ValueError, match=message):
        moba_attention(**{**arguments, "block_size": 4, "top_k": 2, **BAD[message]})


def test_the_own_block_alone_needs_no_means(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = tensors(40, (4, 2), 8, torch.float64)
    expected = moba_attention(q, k, v, block_size=8, top_k=1, impl="reference")
    monkeypatch.setattr(moba, "block_means", None)
    for pooling in ("mean", "minmax"):
        out = moba_attention(q, k, v, block_size=8, top_k=1, pooling=pooling)
        assert (out - expected).abs().max() <= 1e-12
