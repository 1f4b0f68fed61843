"""Sums of gradients over micro-batches and ranks, in float32: what we change of DeepSpeed's ZeRO 1 and 2."""

from collections.abc import Callable, Sequence
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


def add_in_place(zero: Any, *, together: bool) -> None:
    """Have ZeRO-1 add gradients in half precision to their float32 sums without copies of them in float32.

    In place of two launches and 18 bytes moved for each number of each gradient: one launch, 10 bytes. With `together`
    all gradients of a backward pass wait for its end and are added by a few kernels; but where DeepSpeed reduces the
    sums beside the backward pass, they are needed one by one. The bits are the same each way.
    """
    parameters: list[Any] = [parameter for group in zero.bit16_groups for parameter in group]
    add_all = torch.compile(_add, dynamic=False)  # inductor makes kernels of whole lists, once for each list of sizes
    waiting_in = -1  # the backward pass at whose end gradients are added

    @torch.no_grad()
    def move(ready: Sequence[Any], add: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> None:
        new = [parameter for parameter in ready if parameter.grad_accum is None]
        others = [parameter for parameter in ready if parameter.grad_accum is not None]
        if others:
            add([parameter.grad_accum for parameter in others], [parameter.grad for parameter in others])
        if new:
            gradients = [parameter.grad for parameter in new]
            sums = [torch.empty_like(gradient, dtype=zero.gradient_accumulation_dtype) for gradient in gradients]
            torch._foreach_copy_(sums, gradients)  # torch's own kernel for lists casts, unlike that of an addition
            for parameter, started in zip(new, sums, strict=True):
                parameter.grad_accum = started
        for parameter in ready:
            parameter.grad = None

    def take(parameter: Any) -> None:
        """In place of DeepSpeed's `_fill_param_grad_accum_attribute`: called whenever a gradient may be ready."""
        nonlocal waiting_in
        if parameter.grad is None:
            return
        backward_pass = torch._C._current_graph_task_id()  # -1 outside
        if not together or backward_pass < 0 or (zero.overlap_comm and zero.is_gradient_accumulation_boundary()):
            move([parameter], _add)
        elif backward_pass != waiting_in:
            waiting_in = backward_pass
            torch.autograd.Variable._execution_engine.queue_callback(  # as DeepSpeed and torch's DDP do
                lambda: move([parameter for parameter in parameters if parameter.grad is not None], add_all)
            )

    zero._fill_param_grad_accum_attribute = take


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Called as it is, it launches a kernel for each tensor: torch's own for lists want one dtype."""
    torch._foreach_add_(sums, gradients)
