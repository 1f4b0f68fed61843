"""The Triton kernels of experts without a GPU: exact in Triton's interpreter, compilable, and few.

The first two need a process of their own, because Triton reads its mode when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from neomoba_dist.model.moe import balance, fp32_linear, ops, router_ops
from tests.triton_runs import Operators, interpret, run_python
from tests.unit.moe.test_moe import TOKENS, make_inputs, make_layer

HERE = Path(__file__).resolve().parent


def test_kernels_are_exact_in_the_interpreter() -> None:
    interpret(HERE / "interpreted_moe.py")


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    output = run_python([str(HERE / "compiled_moe.py")], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert output.count("sort_kernel") == 3
    assert output.count("route_kernel") == 5


OPERATORS = {
    f"neomoba.{operator._name}": operator
    for operator in (
        ops.mixture,
        ops.mixture_backward,
        router_ops.route_tokens,
        router_ops._route_tokens_backward,
        router_ops.balance_loss,
        router_ops._balance_loss_backward,
        fp32_linear.exact_linear,
        fp32_linear._exact_linear_backward,
    )
}


class Launches(Operators):
    """Counts what the operators of experts launch one by one; views launch nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = OPERATORS.get(str(func).removesuffix(".default"))
        if operator is not None:
            with self:
                return operator._init_fn(*args)
        if func.is_view:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of Triton kernels and grouped products as on Hopper; none is made."""
    names: list[str] = []

    def grouped(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        names.extend(("addresses", "grouped_mm"))
        shape = (len(a), b.shape[-1]) if b.dim() == 3 else (len(offs), len(a), b.shape[1])
        return a.new_empty(shape)

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: names.append(self.fn.__name__))
    monkeypatch.setattr(F, "grouped_mm", grouped)
    monkeypatch.setattr(ops, "has_grouped_mm", lambda *tensors: True)
    return names


def test_the_experts_take_few_launches(made: list[str]) -> None:
    """Nothing is copied to the host either way."""
    layer, _ = make_layer(torch.bfloat16)
    x_TH, weight_TK = make_inputs()[0].detach().bfloat16(), torch.ones(TOKENS, 2)
    expert_TK = torch.zeros(TOKENS, 2, dtype=torch.int64)
    with Launches() as launches:
        _, *saved = ops.mixture(x_TH, expert_TK, weight_TK, *layer.experts.parameters(), 0)
    assert len(made) + launches.count == 5 + 3 * 2
    made.clear()
    with Launches() as launches:
        weights = [w.detach() for w in layer.experts.parameters()]
        ops.mixture_backward._init_fn(x_TH, x_TH, weight_TK, *weights, *saved, 0)
    assert len(made) + launches.count == 3 + 6 * 2


def test_a_layer_takes_at_most_20_launches_forward(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Router, balance losses and record included."""
    for module in (router_ops, balance):
        monkeypatch.setattr(module, "takes_kernels", lambda scores: True)
    layer, _ = make_layer(torch.bfloat16)
    x_TH, positions = make_inputs()
    x_TH = x_TH.detach().bfloat16().requires_grad_()
    with Launches() as launches:
        y_TH, aux_loss, _ = layer(x_TH, positions)
    assert made[:2] == ["route_kernel", "finish_kernel"]
    assert len(made) + launches.count <= 20
    made.clear()
    with Launches() as launches:
        torch.autograd.grad([y_TH, aux_loss], [x_TH, *layer.parameters()], [y_TH, aux_loss])
    assert len(made) + launches.count <= 30
