"""Tokens to the experts of this rank and back as one torch operator, so that a compiled graph holds it whole.

On a GPU with torch's grouped matrix product (`has_grouped_mm`) by the kernels of kernels.py, without a size on the
host; elsewhere one expert after the other.

Shape letters: S tokens, H hidden size, I intermediate size of an expert on this rank, K experts per token, E experts,
P rows.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.model.moe.swiglu import has_grouped_mm, swiglu_backward, swiglu_forward
from neomoba_dist.model.optional import is_available, log_choice
from neomoba_dist.parallel.expert_rows import (
    RowOrder,
    combine,
    combine_backward,
    count_choices,
    order_by_expert,
    spread,
    spread_backward,
)


def _is_fused(x_SH: Tensor, gate_EIH: Tensor) -> bool:
    """Whether sizes stay on the device."""
    fused = len(x_SH) > 0 and has_grouped_mm(x_SH, gate_EIH) and is_available("triton")
    log_choice(f"experts in {x_SH.dtype} on {x_SH.device.type}", "grouped products" if fused else "one by one")
    return fused


@torch.library.custom_op("neomoba::mixture", mutates_args=())
def mixture(
    x_SH: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    fill: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All experts of all tokens, and what the backward pass needs: pairs, slots, sizes (or ends), rows [P, H], gate
    and up [P, I], results [P, H] (none of the fused path).

    P: S * K, or E * fill. Rows after the last one that an expert has are undefined, and so are their pairs.
    """
    if _is_fused(x_SH, gate_EIH):
        return _fused_mixture(x_SH, expert_SK, weight_SK, gate_EIH, up_EIH, down_EHI)
    counts_E = count_choices(expert_SK, len(gate_EIH))
    sizes_E = torch.full_like(counts_E, fill) if fill else counts_E
    sizes = sizes_E.tolist()
    order = order_by_expert(expert_SK, counts_E, sum(sizes), fill)
    rows_RH = spread(x_SH, order)
    result_RH, gate_RI, up_RI = swiglu_forward(rows_RH, gate_EIH, up_EIH, down_EHI, sizes)
    y_SH = combine(result_RH, weight_SK, order)
    most = len(gate_EIH) * fill or expert_SK.numel()
    kept = [_lengthened(t, most) for t in (order.pair_P, rows_RH, gate_RI, up_RI, result_RH)]
    return y_SH, kept[0], order.slot_SK, sizes_E, *kept[1:]  # type: ignore[return-value]


@mixture.register_fake
def _(
    x_SH: Tensor, expert_SK: Tensor, weight_SK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, fill: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fused = _is_fused(x_SH, gate_EIH)
    integers = torch.int32 if fused else torch.int64
    num_experts, intermediate, hidden = gate_EIH.shape
    pairs = expert_SK.numel() if fused or not fill else num_experts * fill
    return (
        torch.empty_like(x_SH, memory_format=torch.contiguous_format),
        expert_SK.new_empty(pairs, dtype=integers),
        expert_SK.new_empty(expert_SK.shape, dtype=integers),
        expert_SK.new_empty(num_experts, dtype=integers),
        x_SH.new_empty(pairs, hidden),
        x_SH.new_empty(pairs, intermediate),
        x_SH.new_empty(pairs, intermediate),
        x_SH.new_empty(0 if fused else pairs, hidden),
    )


@torch.library.custom_op("neomoba::mixture_backward", mutates_args=())
def mixture_backward(
    grad_SH: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    pair_P: Tensor,
    slot_SK: Tensor,
    sizes_E: Tensor,
    rows_PH: Tensor,
    gate_PI: Tensor,
    up_PI: Tensor,
    result_PH: Tensor,
    fill: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate, up and down."""
    if _is_fused(grad_SH, gate_EIH):
        saved = (pair_P, slot_SK, sizes_E, rows_PH, gate_PI, up_PI)
        return _fused_mixture_backward(grad_SH, weight_SK, gate_EIH, up_EIH, down_EHI, *saved)
    sizes = sizes_E.tolist()
    rows = sum(sizes)
    order = RowOrder(pair_P[:rows], slot_SK, full=not fill and rows == slot_SK.numel())
    grad_RH, grad_weight = combine_backward(grad_SH, result_PH[:rows], weight_SK, order)
    weights = (gate_EIH, up_EIH, down_EHI)
    grad_rows, *grads = swiglu_backward(grad_RH, rows_PH[:rows], *weights, gate_PI[:rows], up_PI[:rows], sizes)
    return spread_backward(grad_rows, order), grad_weight, *grads  # type: ignore[return-value]


@mixture_backward.register_fake
def _(
    grad_SH: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    pair_P: Tensor,
    slot_SK: Tensor,
    sizes_E: Tensor,
    rows_PH: Tensor,
    gate_PI: Tensor,
    up_PI: Tensor,
    result_PH: Tensor,
    fill: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad_SH, weight_SK, gate_EIH, up_EIH, down_EHI)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)  # type: ignore[return-value]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight_SK, gate_EIH, up_EIH, down_EHI, ctx.fill = inputs
    ctx.save_for_backward(weight_SK, gate_EIH, up_EIH, down_EHI, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_SH: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, *grads = mixture_backward(grad_SH, *ctx.saved_tensors, ctx.fill)
    return grad_x, None, grad_weight, *grads, None


mixture.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _lengthened(tensor: Tensor, rows: int) -> Tensor:
    """The same with undefined rows after its own: shapes must not depend on values."""
    if len(tensor) == rows:
        return tensor
    result = tensor.new_empty(rows, *tensor.shape[1:])
    result[: len(tensor)] = tensor
    return result


def _fused_mixture(
    x_SH: Tensor, expert_SK: Tensor, weight_SK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weight multiplies before the last product, so that its gradient needs no results."""
    from neomoba_dist.model.moe import kernels

    pairs = kernels.sort_pairs(expert_SK, len(gate_EIH))
    rows_PH = kernels.spread_rows(x_SH, pairs)
    gate_PI = F.grouped_mm(rows_PH, gate_EIH.transpose(1, 2), offs=pairs.ends_E)
    up_PI = F.grouped_mm(rows_PH, up_EIH.transpose(1, 2), offs=pairs.ends_E)
    h_PI = kernels.weighted_swiglu(gate_PI, up_PI, weight_SK, pairs)
    result_PH = F.grouped_mm(h_PI, down_EHI.transpose(1, 2), offs=pairs.ends_E)
    return kernels.sum_rows(result_PH, pairs), *pairs, rows_PH, gate_PI, up_PI, x_SH.new_empty(0, x_SH.shape[1])


def _fused_mixture_backward(
    grad_SH: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    pair_P: Tensor,
    slot_SK: Tensor,
    ends_E: Tensor,
    rows_PH: Tensor,
    gate_PI: Tensor,
    up_PI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from neomoba_dist.model.moe import kernels

    pairs = kernels.SortedPairs(pair_P, slot_SK, ends_E)
    grad_PH = kernels.spread_rows(grad_SH, pairs)
    grad_PI = F.grouped_mm(grad_PH, down_EHI, offs=ends_E)
    grad_gate_PI, grad_up_PI, grad_weight, h_PI = kernels.weighted_swiglu_backward(
        grad_PI, gate_PI, up_PI, weight_SK, pairs
    )
    grad_down = F.grouped_mm(grad_PH.t(), h_PI, offs=ends_E)
    grad_gate = F.grouped_mm(grad_gate_PI.t(), rows_PH, offs=ends_E)
    grad_up = F.grouped_mm(grad_up_PI.t(), rows_PH, offs=ends_E)
    parts = [F.grouped_mm(*one, offs=ends_E) for one in ((grad_gate_PI, gate_EIH), (grad_up_PI, up_EIH))]
    return kernels.sum_rows(parts[0], pairs, parts[1]), grad_weight, grad_gate, grad_up, grad_down
