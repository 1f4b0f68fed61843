"""Tensor-parallel linear layers and sequence-parallel mappings, by megatron-core.

megatron-core is imported inside the functions: it takes seconds, and a mesh of ones never needs it. Its layers are
used in their functional form, because our parameters are declared by logical name (model/init.py) and not by layer.
Source: Megatron-LM (arXiv 1909.08053, section 3) and sequence parallelism (arXiv 2205.05198, section 4.2).

Shape letters: T tokens (all of them), S tokens of this rank (T / tp with sequence parallelism, else T), I and O the
input and output features of the whole layer, o and i those of this rank.
"""

import torch

from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.gemm import linear
from neomoba_dist.parallel.mesh import Mesh


def column_linear(x_SI: torch.Tensor, weight_oI: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """x W^T with the output features split over tp. Returns [T, o].

    With sequence parallelism the tokens are gathered first and the input gradient is reduce-scattered; without it the
    input gradient is all-reduced. Only the shard of x is kept for the backward pass.
    """
    if mesh["tp"].size == 1:
        return linear(x_SI, weight_oI)
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    return linear_with_grad_accumulation_and_async_allreduce(
        x_SI,
        weight_oI,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=not mesh.sequence_parallel,
        sequence_parallel=mesh.sequence_parallel,
        tp_group=mesh["tp"].group,
    )


def row_linear(x_Ti: torch.Tensor, weight_Oi: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """x W^T with the input features split over tp; the partial products are summed. Returns [S, O]."""
    return sum_over_tensor_parallel(linear(x_Ti, weight_Oi), mesh)


def sum_over_tensor_parallel(x_TH: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Add the partial results of the tp ranks: all-reduce, or reduce-scatter over tokens with sequence parallelism."""
    if mesh["tp"].size == 1:
        return x_TH
    from megatron.core.tensor_parallel import mappings

    # megatron-core reduces a copy and returns the original when the tensor is not contiguous
    x_TH = x_TH.contiguous()
    if mesh.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x_TH, group=mesh["tp"].group)
    return mappings.reduce_from_tensor_model_parallel_region(x_TH, group=mesh["tp"].group)


def enter_tensor_parallel(x_SH: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """All tokens on every tp rank; the gradient is the sum of what the ranks contribute. Returns [T, H]."""
    if mesh["tp"].size == 1:
        return x_SH
    if mesh.sequence_parallel:
        from megatron.core.tensor_parallel import mappings

        return mappings.gather_from_sequence_parallel_region(x_SH, group=mesh["tp"].group)
    return sum_gradient(x_SH, mesh, "tp")  # contiguous-safe, unlike megatron's copy mapping


def gather_tokens(x_SH: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """All tokens on every tp rank, for what all of them compute alike: each keeps its own tokens' gradient. [T, H]"""
    if not mesh.sequence_parallel:
        return x_SH
    from megatron.core.tensor_parallel import mappings

    return mappings.gather_from_sequence_parallel_region(
        x_SH, tensor_parallel_output_grad=False, group=mesh["tp"].group
    )


def pick_tokens(x_SH: torch.Tensor, places_P: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The tokens at `places_P`, int64, of all of them, on every tp rank, for what all compute alike as in
    `gather_tokens`. Sends these alone. [P, H]"""
    if not mesh.sequence_parallel:
        return x_SH.index_select(0, places_P)
    from megatron.core.tensor_parallel import mappings

    local = places_P - mesh["tp"].index * len(x_SH)
    owned = (local >= 0) & (local < len(x_SH))
    rows_PH = x_SH.index_select(0, local.where(owned, 0)) * owned[:, None]
    return mappings.reduce_from_tensor_model_parallel_region(rows_PH, group=mesh["tp"].group)
