"""SwiGLU of many experts on rows that are sorted by expert, numbers of rows on the host.

By torch's grouped matrix product where it is known to be right (`has_grouped_mm`); elsewhere one expert after the
other, with a backward pass that writes each expert's gradient in place and computes the activation again instead of
keeping it.

Shape letters: R rows, H hidden size, I intermediate size of an expert on this rank, E experts of this rank.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def has_grouped_mm(rows_RH: Tensor, gate_EIH: Tensor) -> bool:
    """Whether torch has a grouped kernel that takes these tensors, is right, and beats one product per expert.

    It has one for bfloat16 on Hopper (compute capability 9.x). On Blackwell its weight gradients of experts without
    rows are not zero (pytorch issue 172439); before Hopper it is a loop itself. Rows must be multiples of 16 bytes.
    """
    if not rows_RH.is_cuda or rows_RH.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return (
        gate_EIH.shape[1] % 8 == gate_EIH.shape[2] % 8 == 0 and torch.cuda.get_device_capability(rows_RH.device)[0] == 9
    )


def swiglu_by_expert(rows_RH: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, sizes: list[int]) -> Tensor:
    """Rows [R, H], of which the first `sizes[0]` belong to this rank's first expert and so on, -> [R, H]."""
    if len(rows_RH) and has_grouped_mm(rows_RH, gate_EIH):
        return grouped_swiglu(rows_RH, gate_EIH, up_EIH, down_EHI, sizes)
    return SwiGLUByExpert.apply(rows_RH, gate_EIH, up_EIH, down_EHI, sizes)


def grouped_swiglu(rows_RH: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, sizes: list[int]) -> Tensor:
    """All experts by three grouped products, [R, H]."""
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=rows_RH.device)
    gate = F.grouped_mm(rows_RH, gate_EIH.transpose(1, 2), offs=ends)
    up = F.grouped_mm(rows_RH, up_EIH.transpose(1, 2), offs=ends)
    return F.grouped_mm(F.silu(gate) * up, down_EHI.transpose(1, 2), offs=ends)


class SwiGLUByExpert(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), expert by expert."""

    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, sizes: list[int]
    ) -> Tensor:
        result_RH, gate_RI, up_RI = swiglu_forward(rows_RH, gate_EIH, up_EIH, down_EHI, sizes)
        ctx.save_for_backward(rows_RH, gate_EIH, up_EIH, down_EHI, gate_RI, up_RI)
        ctx.sizes = sizes
        return result_RH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RH, gate_EIH, up_EIH, down_EHI, gate_RI, up_RI = ctx.saved_tensors
        return *swiglu_backward(grads[0], rows_RH, gate_EIH, up_EIH, down_EHI, gate_RI, up_RI, ctx.sizes), None


def swiglu_forward(
    rows_RH: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Results [R, H], gate and up [R, I], one expert after the other."""
    gate_RI = rows_RH.new_empty(len(rows_RH), gate_EIH.shape[1])
    up_RI, result_RH = torch.empty_like(gate_RI), torch.empty_like(rows_RH)
    for expert, part in _parts(sizes):
        torch.mm(rows_RH[part], gate_EIH[expert].t(), out=gate_RI[part])
        torch.mm(rows_RH[part], up_EIH[expert].t(), out=up_RI[part])
        torch.mm(F.silu(gate_RI[part]).mul_(up_RI[part]), down_EHI[expert].t(), out=result_RH[part])
    return result_RH, gate_RI, up_RI


def swiglu_backward(
    grad_RH: Tensor,
    rows_RH: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    gate_RI: Tensor,
    up_RI: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, gate, up and down. An expert without rows gets zeros."""
    grad_rows = torch.empty_like(rows_RH)
    grad_gate, grad_up, grad_down = (torch.zeros_like(weight) for weight in (gate_EIH, up_EIH, down_EHI))
    for expert, part in _parts(sizes):
        rows, gate, up, grad = rows_RH[part], gate_RI[part], up_RI[part], grad_RH[part]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        torch.mm(grad.t(), silu * up, out=grad_down[expert])
        grad_h = grad @ down_EHI[expert]
        # the derivative of silu is sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(silu, sigmoid, 1 - silu).mul_(grad_h).mul_(up)
        grad_up_rows = grad_h.mul_(silu)
        torch.mm(slope.t(), rows, out=grad_gate[expert])
        torch.mm(grad_up_rows.t(), rows, out=grad_up[expert])
        torch.mm(slope, gate_EIH[expert], out=grad_rows[part])
        grad_rows[part].addmm_(grad_up_rows, up_EIH[expert])
    return grad_rows, grad_gate, grad_up, grad_down


def _parts(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has some."""
    borders = pairwise(accumulate(sizes, initial=0))
    return [(expert, slice(start, stop)) for expert, (start, stop) in enumerate(borders) if stop > start]
