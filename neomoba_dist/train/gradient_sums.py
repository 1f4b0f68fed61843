"""Sums of gradients over micro-batches and ranks, in float32: what we change of DeepSpeed's ZeRO 1 and 2."""

from typing import Any

import torch
from torch import nn


def average_in(dtype: torch.dtype, zero: Any) -> None:
    """Have ZeRO-2 average gradients in `dtype` before it reduces them.

    It would in that of the weights: in its buckets, and where a gradient is too large for one and goes by itself.
    """

    def gradient(parameter: nn.Parameter) -> torch.Tensor | None:
        if parameter.grad is not None and parameter.numel() > zero.reduce_bucket_size:
            parameter.grad.data = parameter.grad.data.to(dtype)
        return parameter.grad

    zero._gradient_reduction_buffer_dtype = lambda: dtype
    zero.get_gradient_for_reduction = gradient
