"""Libraries behind the table of kernels: what is chosen when, and what they are handed. No library is needed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import choice
from neomoba_dist.model.attention.kernels.choice import Call, full_attention_kernel
from neomoba_dist.model.attention.kernels.full import RUN, Documents, full_attention
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from tests.unit.attention.library_stand_ins import flash_attn_2, flash_attn_4
from tests.unit.attention.varlen_reference import REFERENCE

BORDERS = [0, 0, 5, 6, 20, 32]
GPU = torch.device("cuda", 0)
PACKED = Call(GPU, torch.bfloat16, 64, 8192, True)


def draw(dtype: torch.dtype = torch.float64, tokens: int = 32) -> list[Tensor]:
    """q, k, v that require a gradient, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(i < 3) for i, s in enumerate(shapes)]


def cu(borders: list[int]) -> Tensor:
    return torch.tensor(borders, dtype=torch.int32)


@pytest.mark.parametrize(
    ("has", "major", "call", "kernel"),
    [
        ((), 9, PACKED, "torch_flash"),
        (("flash_attn",), 9, PACKED, "flash_attn_2"),
        (("flash_attn", "flash_attn_4"), 9, PACKED, "flash_attn_4"),
        (("flash_attn", "flash_attn_4"), 8, PACKED, "flash_attn_2"),
        (("flash_attn_4",), 10, PACKED._replace(head_dim=192), "torch_flash"),
        (("flash_attn_4",), 9, PACKED._replace(head_dim=192), "flash_attn_4"),
        (("flash_attn_4",), 9, PACKED._replace(packed=False), "cudnn"),
        (("flash_attn_4",), 9, PACKED._replace(packed=False, tokens=1000), "flash_attn_4"),
        ((), 8, PACKED._replace(packed=False), "sdpa"),
        ((), 9, PACKED._replace(head_dim=20), "sdpa"),
        (("flash_attn", "flash_attn_4"), 9, PACKED._replace(dtype=torch.float32), "sdpa"),
        (("flash_attn", "flash_attn_4"), 9, Call(torch.device("cpu"), torch.bfloat16, 64, 8192, True), "documents"),
        (("flash_attn", "flash_attn_4"), 9, Call(torch.device("cpu"), torch.bfloat16, 64, 8192, False), "sdpa"),
    ],
)
def test_the_choice_of_full_attention(
    has: tuple[str, ...], major: int, call: Call, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "is_available", has.__contains__)
    monkeypatch.setattr(choice, "_capability", lambda index: major)
    assert full_attention_kernel(call) == kernel


def test_where_bits_must_repeat_cudnn_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_available", ("flash_attn_4",).__contains__)
    monkeypatch.setattr(choice, "_capability", lambda index: 9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert full_attention_kernel(PACKED._replace(packed=False)) == "flash_attn_4"


def test_every_kernel_of_the_table_can_run() -> None:
    assert list(RUN) == list(choice.FULL_ATTENTION)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", [BORDERS, None])
def test_the_operator_equals_full_attention(
    borders: list[int] | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plain pair of functions in the place of a library's: output and gradients, eager and compiled."""
    monkeypatch.setitem(LIBRARIES, "flash_attn_4", REFERENCE)
    q, k, v, grad = draw()
    longest = 14 if borders else 32
    cu_seqlens = None if borders is None else cu(borders)

    def by_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return RUN["flash_attn_4"](q, k, v, causal, Documents(cu_seqlens, longest, None))

    want = full_attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
    expected = (want, *torch.autograd.grad(want, (q, k, v), grad))
    for run in (by_library, torch.compile(by_library, backend="aot_eager", fullgraph=True)):
        out = run(q, k, v)
        for got, wanted in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), expected, strict=True):
            assert (got - wanted).abs().max() < 1e-12
            assert wanted.any()


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_by_the_order_of_backends(causal: bool) -> None:
    """What asks for cuDNN, where the next backend of its order has to do: grouped heads, eager and compiled."""
    q, k, v, grad = draw()

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return RUN["cudnn"](q, k, v, causal, Documents(None, 32, None))

    want = full_attention(q, k, v, causal=causal)
    expected = (want, *torch.autograd.grad(want, (q, k, v), grad))
    for run in (by_cudnn, torch.compile(by_cudnn, backend="aot_eager", fullgraph=True)):
        out = run(q, k, v)
        for got, wanted in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), expected, strict=True):
            assert (got - wanted).abs().max() < 1e-12


def install(monkeypatch: pytest.MonkeyPatch, **functions: dict[str, Any]) -> None:
    """Modules of these names (__ for a dot) that hold these functions."""
    for name, content in functions.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_2"])
def test_a_library_is_called_by_its_own_signature(
    name: str, causal: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = flash_attn_4(), flash_attn_2()
    install(monkeypatch, flash_attn={}, flash_attn__cute=new, flash_attn__cute__interface=new)
    install(monkeypatch, flash_attn__flash_attn_interface=old)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, k, v, grad = (x.detach() for x in draw())
    rest = (cu(BORDERS), cu(BORDERS), 14, 14, causal, 0.25)
    library = LIBRARIES[name]
    out, lse = library.forward(q, k, v, *rest)
    want, want_lse = REFERENCE.forward(q, k, v, *rest)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    gradients = library.backward(grad, q, k, v, out, lse, *rest)
    for got, wanted in zip(gradients, REFERENCE.backward(grad, q, k, v, out, lse, *rest), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("pair", ["forward", "backward"])
def test_torch_has_the_operators_that_are_called(pair: str) -> None:
    """Their arguments, by position and by name, bind to the schema of the installed torch."""
    schema = getattr(torch.ops.aten, f"_flash_attention_{pair}").default._schema
    names = [argument.name for argument in schema.arguments]
    shared = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    given = {
        "forward": ["query", "key", "value", *shared, "return_debug_mask"],
        "backward": ["grad_out", "query", "key", "value", "out", "logsumexp", *shared, "rng_state", "unused"],
    }
    assert names[: len(given[pair])] == given[pair]
    assert "scale" in names
