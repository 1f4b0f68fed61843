"""Tokens to the experts of this rank and back as one torch operator, so that a compiled graph holds it whole.

On a GPU with torch's grouped matrix product (`has_grouped_mm`) by the kernels of kernels.py, without a size on the
host; elsewhere one expert after the other.

Shape letters: S tokens, H hidden size, I intermediate size of an expert on this rank, K experts per token, E experts,
P rows.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from neomoba_dist.model.moe.kernels import SortedPairs

PREFERRED = "torch"  # or "quack": the faster one of `evals bench moe`; docs/moe.md


def _products(x_SH: Tensor, gate_EIH: Tensor) -> str:
    """Whose grouped products run: "torch", "quack", or "" for one expert after the other, with sizes on the host."""
    kind = ""
    if len(x_SH) > 0 and has_grouped_mm(x_SH, gate_EIH) and is_available("triton"):
        kind = "quack" if PREFERRED == "quack" and is_available("quack") else "torch"
    log_choice(
        f"experts in {x_SH.dtype} on {x_SH.device.type}", f"grouped products of {kind}" if kind else "one by one"
    )
    return kind


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
    """All experts of all tokens, and what the backward pass needs: pairs, slots, sizes (or borders), rows [P, H], gate
    and up [P, I], results [P, H]; grouped products need no results, and those of quack no rows.

    P: S * K, or E * fill. Rows after the last one that an expert has are undefined, and so are their pairs.
    """
    if products := _products(x_SH, gate_EIH):
        return _grouped_mixture(products, x_SH, expert_SK, weight_SK, gate_EIH, up_EIH, down_EHI)
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
    products = _products(x_SH, gate_EIH)
    integers = torch.int32 if products else torch.int64
    num_experts, intermediate, hidden = gate_EIH.shape
    pairs = expert_SK.numel() if products or not fill else num_experts * fill
    return (
        torch.empty_like(x_SH, memory_format=torch.contiguous_format),
        expert_SK.new_empty(pairs, dtype=integers),
        expert_SK.new_empty(expert_SK.shape, dtype=integers),
        expert_SK.new_empty(num_experts + bool(products), dtype=integers),
        x_SH.new_empty(0 if products == "quack" else pairs, hidden),
        x_SH.new_empty(pairs, intermediate * (1 + (products == "quack"))),
        x_SH.new_empty(0 if products == "quack" else pairs, intermediate),
        x_SH.new_empty(0 if products else pairs, hidden),
    )


@torch.library.custom_op("neomoba::mixture_backward", mutates_args=())
def mixture_backward(
    grad_SH: Tensor,
    x_SH: Tensor,
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
    if products := _products(grad_SH, gate_EIH):
        from neomoba_dist.model.moe.kernels import SortedPairs

        pairs = SortedPairs(pair_P, slot_SK, sizes_E)
        if products == "quack":
            from neomoba_dist.model.moe.quack import quack_mixture_backward

            return quack_mixture_backward(grad_SH, x_SH, weight_SK, gate_EIH, up_EIH, down_EHI, pairs, gate_PI)
        return _grouped_backward(grad_SH, weight_SK, gate_EIH, up_EIH, down_EHI, pairs, rows_PH, gate_PI, up_PI)
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
    x_SH: Tensor,
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
    x_SH, _, weight_SK, gate_EIH, up_EIH, down_EHI, ctx.fill = inputs
    ctx.save_for_backward(x_SH, weight_SK, gate_EIH, up_EIH, down_EHI, *output[1:])
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


def _grouped_mixture(
    products: str,
    x_SH: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mixture`. With torch's products a weight multiplies before the last one: its gradient needs no results."""
    from neomoba_dist.model.moe import kernels

    pairs = kernels.sort_pairs(expert_SK, len(gate_EIH))
    no_PH, no_PI = x_SH.new_empty(0, x_SH.shape[1]), x_SH.new_empty(0, gate_EIH.shape[1])
    if products == "quack":
        from neomoba_dist.model.moe.quack import quack_mixture

        y_SH, before_PI = quack_mixture(x_SH, weight_SK, gate_EIH, up_EIH, down_EHI, pairs)
        return y_SH, *pairs, no_PH, before_PI, no_PI, torch.empty_like(no_PH)
    rows_PH, ends_E = kernels.spread_rows(x_SH, pairs), pairs.ends_E
    gate_PI, up_PI = (F.grouped_mm(rows_PH, w.transpose(1, 2), offs=ends_E) for w in (gate_EIH, up_EIH))
    h_PI = kernels.weighted_swiglu(gate_PI, up_PI, weight_SK, pairs)
    result_PH = F.grouped_mm(h_PI, down_EHI.transpose(1, 2), offs=ends_E)
    return kernels.sum_rows(result_PH, pairs), *pairs, rows_PH, gate_PI, up_PI, no_PH


def _grouped_backward(
    grad_SH: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    pairs: "SortedPairs",
    rows_PH: Tensor,
    gate_PI: Tensor,
    up_PI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from neomoba_dist.model.moe import kernels

    ends_E, grad_PH = pairs.ends_E, kernels.spread_rows(grad_SH, pairs)
    grad_PI = F.grouped_mm(grad_PH, down_EHI, offs=ends_E)
    grad_gate_PI, grad_up_PI, grad_weight, h_PI = kernels.weighted_swiglu_backward(
        grad_PI, gate_PI, up_PI, weight_SK, pairs
    )
    grad_down = F.grouped_mm(grad_PH.t(), h_PI, offs=ends_E)
    grad_gate, grad_up = (F.grouped_mm(g.t(), rows_PH, offs=ends_E) for g in (grad_gate_PI, grad_up_PI))
    by_gate_PH = F.grouped_mm(grad_gate_PI, gate_EIH, offs=ends_E)
    by_up_PH = F.grouped_mm(grad_up_PI, up_EIH, offs=ends_E)
    return kernels.sum_rows(by_gate_PH, pairs, by_up_PH), grad_weight, grad_gate, grad_up, grad_down
