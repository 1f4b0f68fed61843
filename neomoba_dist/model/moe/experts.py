"""The experts: SwiGLU layers (arXiv 2002.05202), all of this rank's computed on rows that are sorted by expert.

By torch's grouped matrix product where it is known to be right (`has_grouped_mm`); elsewhere one expert after the
other, with a backward pass that writes each expert's gradient in place and computes the activation again instead of
keeping it.

Shape letters: R rows, H hidden size, I intermediate size of an expert on this rank, E experts of this rank.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer


class Experts(nn.Module):
    """Rows [R, H], of which the first `sizes[0]` belong to this rank's first expert and so on, -> [R, H].

    Intermediate features are split over tp: the result is then this tp rank's part of a sum.
    """

    def __init__(self, name: str, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        assert intermediate is not None  # resolved by ModelConfig
        wide, narrow = (config.num_experts, intermediate, hidden), (config.num_experts, hidden, intermediate)
        self.gate_proj = init.experts(f"{name}.gate_proj", wide, shard_dim=1)
        self.up_proj = init.experts(f"{name}.up_proj", wide, shard_dim=1)
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the dense layer's output
        self.down_proj = init.experts(f"{name}.down_proj", narrow, shard_dim=2, scale=scale)

    def forward(self, rows_RH: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        if len(rows_RH) and has_grouped_mm(rows_RH, self.gate_proj):
            return grouped_swiglu(rows_RH, *weights, sizes)
        return SwiGLUByExpert.apply(rows_RH, *weights, sizes)


def has_grouped_mm(rows_RH: torch.Tensor, gate_EIH: torch.Tensor) -> bool:
    """Whether torch has a grouped kernel that takes these tensors, is right, and beats one product per expert.

    It has one for bfloat16 on Hopper (compute capability 9.x). On Blackwell its weight gradients of experts without
    rows are not zero (pytorch issue 172439); before Hopper it is a loop itself. Rows must be multiples of 16 bytes.
    """
    if not rows_RH.is_cuda or rows_RH.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return (
        gate_EIH.shape[1] % 8 == gate_EIH.shape[2] % 8 == 0 and torch.cuda.get_device_capability(rows_RH.device)[0] == 9
    )


def grouped_swiglu(
    rows_RH: torch.Tensor, gate_EIH: torch.Tensor, up_EIH: torch.Tensor, down_EHI: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """All experts by three grouped products, [R, H]."""
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=rows_RH.device)
    gate = F.grouped_mm(rows_RH, gate_EIH.transpose(1, 2), offs=ends)
    up = F.grouped_mm(rows_RH, up_EIH.transpose(1, 2), offs=ends)
    return F.grouped_mm(F.silu(gate) * up, down_EHI.transpose(1, 2), offs=ends)


class SwiGLUByExpert(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), expert by expert. An expert without rows gets a gradient of zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: torch.Tensor,
        gate_EIH: torch.Tensor,
        up_EIH: torch.Tensor,
        down_EHI: torch.Tensor,
        sizes: list[int],
    ) -> torch.Tensor:
        gate_RI = rows_RH.new_empty(len(rows_RH), gate_EIH.shape[1])
        up_RI, result_RH = torch.empty_like(gate_RI), torch.empty_like(rows_RH)
        for expert, part in _parts(sizes):
            torch.mm(rows_RH[part], gate_EIH[expert].t(), out=gate_RI[part])
            torch.mm(rows_RH[part], up_EIH[expert].t(), out=up_RI[part])
            torch.mm(F.silu(gate_RI[part]).mul_(up_RI[part]), down_EHI[expert].t(), out=result_RH[part])
        ctx.save_for_backward(rows_RH, gate_EIH, up_EIH, down_EHI, gate_RI, up_RI)
        ctx.sizes = sizes
        return result_RH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_RH, gate_EIH, up_EIH, down_EHI, gate_RI, up_RI = ctx.saved_tensors
        grad_rows = torch.empty_like(rows_RH)
        grad_gate, grad_up, grad_down = (torch.zeros_like(weight) for weight in (gate_EIH, up_EIH, down_EHI))
        for expert, part in _parts(ctx.sizes):
            rows, gate, up, grad = rows_RH[part], gate_RI[part], up_RI[part], grads[0][part]
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
        return grad_rows, grad_gate, grad_up, grad_down, None


def _parts(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has some."""
    borders = pairwise(accumulate(sizes, initial=0))
    return [(expert, slice(start, stop)) for expert, (start, stop) in enumerate(borders) if stop > start]
