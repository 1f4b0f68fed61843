"""The experts of one rank by the grouped products of `quack-kernels`: they gather their rows themselves, and activation
and its derivative are computed where a product is written. As in SonicMoE (arXiv 2512.14080), whose own package pins
torch below 2.10.

Gate and up lie interleaved in what the products write, one behind the other in their weights ("concat" below).

Shape letters: S tokens, H hidden size, I intermediate size, K choices per token, E experts, P rows.
"""

import torch
from torch import Tensor

from neomoba_dist.model.moe.kernels import SortedPairs, sum_rows


def quack_mixture(
    x_SH: Tensor, weight_SK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor, pairs: SortedPairs
) -> tuple[Tensor, Tensor]:
    """Output [S, H], and gate and up [P, 2 I] for the backward pass."""
    from quack.gemm_interface import gemm, gemm_gated

    wide = torch.cat((gate_EIH, up_EIH), 1).transpose(1, 2)
    before_PI, h_PI = gemm_gated(
        x_SH,
        wide,
        activation="swiglu",
        cu_seqlens_m=pairs.borders,
        A_idx=_token_of_row(pairs),
        concat_layout=("B",),
        tuned=False,
    )
    result_PH = gemm(h_PI, down_EHI.transpose(1, 2), cu_seqlens_m=pairs.borders, tuned=False)
    return sum_rows(result_PH, pairs, weight_SK=weight_SK), before_PI


def quack_mixture_backward(
    grad_SH: Tensor,
    x_SH: Tensor,
    weight_SK: Tensor,
    gate_EIH: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    pairs: SortedPairs,
    before_PI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate, up and down."""
    from quack.gemm_interface import gemm, gemm_dgated

    borders, token_P = pairs.borders, _token_of_row(pairs)
    pair_P = pairs.pair_P.long()
    grad_before_PI, h_PI, grad_weight_P = gemm_dgated(
        grad_SH,
        down_EHI,
        PreAct=before_PI,
        activation="swiglu",
        colvec_scale=weight_SK.flatten()[pair_P],
        colvec_reduce=True,
        cu_seqlens_m=borders,
        A_idx=token_P,
        dynamic_scheduler=False,
        tuned=False,
    )
    # the choices of no expert have rows, too, after all others: their gradient is zero
    is_row = torch.arange(len(pair_P), device=pair_P.device) < borders[-1]
    grad_weight = torch.empty_like(weight_SK)
    grad_weight.view(-1)[pair_P] = torch.where(is_row, grad_weight_P, 0).to(weight_SK.dtype)
    wide = torch.cat((gate_EIH, up_EIH), 1)
    grad_rows = gemm(grad_before_PI, wide, cu_seqlens_m=borders, concat_layout=("B",), tuned=False)
    grad_down, grad_wide = torch.empty_like(down_EHI), torch.empty_like(wide)
    gemm(grad_SH.t(), h_PI, out=grad_down, cu_seqlens_k=borders, A_idx=token_P, tuned=False)
    gemm(
        x_SH.t(),
        grad_before_PI,
        out=grad_wide.transpose(1, 2),
        cu_seqlens_k=borders,
        A_idx=token_P,
        concat_layout=("out",),
        tuned=False,
    )
    grad_gate, grad_up = (part.contiguous() for part in grad_wide.chunk(2, 1))
    return sum_rows(grad_rows, pairs), grad_weight, grad_gate, grad_up, grad_down


def _token_of_row(pairs: SortedPairs) -> Tensor:
    return pairs.pair_P // pairs.slot_SK.shape[1]
