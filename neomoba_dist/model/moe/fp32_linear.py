"""Products that keep float32 where TF32 is allowed: a router's scores and balance must not be rounded to 10 bits.

`neomoba.phase.allow_tf32` sets one switch of the process for all products; these ones turn it off, forward and
backward, and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def exact_linear(x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """x W^T, [S, E], with every product and sum in the dtype of both."""
    return _ExactLinear.apply(x_SH, weight_EH)


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_SH, weight_EH)
        with _without_tf32():
            return x_SH @ weight_EH.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_SH, weight_EH = ctx.saved_tensors
        grad_x = grad_weight = None
        with _without_tf32():
            if ctx.needs_input_grad[0]:
                grad_x = grads[0] @ weight_EH
            if ctx.needs_input_grad[1]:
                grad_weight = grads[0].t() @ x_SH
        return grad_x, grad_weight
