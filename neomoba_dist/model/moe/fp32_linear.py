"""Products that keep float32 where TF32 is allowed: a router's scores and balance must not be rounded to 10 bits.

`neomoba.phase.allow_tf32` sets one switch of the process for all products; these ones turn it off, forward and
backward, and back. An operator, because a compiled graph would turn it off only while it is traced.
"""

# No "from __future__ import annotations" here: torch reads the operator's schema off the annotations.
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def exact_linear(x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """x W^T, [S, E], with every product and sum in the dtype of both."""
    return _exact_product(x_SH, weight_EH.t())


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


@torch.library.custom_op("neomoba::exact_product", mutates_args=())
def _exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with _without_tf32():
        return a @ b


@_exact_product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    grad_a = _exact_product(grad, b.t()) if ctx.needs_input_grad[0] else None
    grad_b = _exact_product(grad.t(), a).t() if ctx.needs_input_grad[1] else None
    return grad_a, grad_b


_exact_product.register_autograd(_differentiate, setup_context=_keep_for_backward)
