"""Products that keep float32 where TF32 is allowed: a router's scores and balance must not be rounded to 10 bits.

`neomoba.phase.allow_tf32` sets one switch of the process for all products; these ones turn it off, forward and
backward, and back. Operators, because a compiled graph would turn it off only while it is traced.

On a GPU, products of bfloat16 are exact in its matrix units, which add in float32; a float32 gradient goes there as
the sum of three bfloat16 parts.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.model.optional import is_available


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


@torch.library.custom_op("neomoba::exact_linear", mutates_args=())
def exact_linear(x_SH: Tensor, weight_EH: Tensor) -> Tensor:
    """x W^T, [S, E]: every product and sum in the dtype of both, or in float32 where that is more."""
    if _in_matrix_units(x_SH, weight_EH):
        return torch.mm(x_SH, weight_EH.t(), out_dtype=torch.float32)
    exact = _exact_dtype(x_SH, weight_EH)
    with _without_tf32():
        return x_SH.to(exact) @ weight_EH.to(exact).t()


@exact_linear.register_fake
def _(x_SH: Tensor, weight_EH: Tensor) -> Tensor:
    return x_SH.new_empty((len(x_SH), len(weight_EH)), dtype=_exact_dtype(x_SH, weight_EH))


@torch.library.custom_op("neomoba::exact_linear_backward", mutates_args=())
def _exact_linear_backward(grad_SE: Tensor, x_SH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    if _in_matrix_units(x_SH, weight_EH):
        from neomoba_dist.model.moe.router_kernels import split_in_three

        parts = split_in_three(grad_SE)
        grad_x = parts @ weight_EH.repeat(3, 1)
        grad_weight = torch.mm(parts.t(), x_SH, out_dtype=torch.float32).unflatten(0, (3, -1)).sum(0)
        return grad_x, grad_weight.to(weight_EH.dtype)
    exact = grad_SE.dtype
    with _without_tf32():
        grad_x, grad_weight = grad_SE @ weight_EH.to(exact), grad_SE.t() @ x_SH.to(exact)
    return grad_x.to(x_SH.dtype), grad_weight.to(weight_EH.dtype)


@_exact_linear_backward.register_fake
def _(grad_SE: Tensor, x_SH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    return x_SH.new_empty(x_SH.shape), weight_EH.new_empty(weight_EH.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_SE: Tensor) -> tuple[Tensor, Tensor]:
    return _exact_linear_backward(grad_SE, *ctx.saved_tensors)


exact_linear.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _exact_dtype(x_SH: Tensor, weight_EH: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x_SH.dtype, weight_EH.dtype), torch.float32)


def _in_matrix_units(x_SH: Tensor, weight_EH: Tensor) -> bool:
    return x_SH.is_cuda and x_SH.dtype == weight_EH.dtype == torch.bfloat16 and is_available("triton")
