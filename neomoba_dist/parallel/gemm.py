"""Matrix products on a CPU: the fastest that this build of torch has, in float32.

Measured on an AVX-512 AMD core with torch 2.13: oneDNN's matrix product runs at 190 to 240 GFLOP/s in float32, forward
and backward, where torch.mm (MKL) reaches 105.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many multiplications the dispatch of oneDNN (12 microseconds) costs more than it gains.
SMALL_PRODUCT = 1 << 19
FEW_ROWS = 32  # of a layer's input; with few rows its backward products are slower than MKL's


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [m, K] @ w [n, K]^T -> [m, n], without gradient; both may be strided."""
    if x.dtype == torch.float32 and x.shape[0] * x.shape[1] * w.shape[0] >= SMALL_PRODUCT and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.t())


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """F.linear, on a CPU in float32 by `product` in both directions.

    Compiled graphs have inductor's choice, and what poses as a tensor, as quantised weights do, its own.
    """
    plain = type(weight_OI) in (Tensor, torch.nn.Parameter) and x_TI.dtype == weight_OI.dtype == torch.float32
    many = x_TI.dim() == 2 and len(x_TI) >= FEW_ROWS
    if plain and many and x_TI.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Linear.apply(x_TI, weight_OI)
    return F.linear(x_TI, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return product(x_TI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_TO,), (x_TI, weight_OI) = grads, ctx.saved_tensors
        grad_x = product(grad_TO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        return grad_x, product(grad_TO.t(), x_TI.t()) if ctx.needs_input_grad[1] else None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN and it is switched on."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
