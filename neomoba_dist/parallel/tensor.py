"""The one door to megatron-core: process groups, tensor-parallel linear layers and sequence-parallel mappings.

megatron-core is imported inside the functions: it takes seconds, and a mesh of ones never needs it. Its layers are
used in their functional form, because our parameters are declared by logical name (model/init.py) and not by layer.
Source: Megatron-LM (arXiv 1909.08053, section 3) and sequence parallelism (arXiv 2205.05198, section 4.2).

Shape letters: T tokens (all of them), S tokens of this rank (T / tp with sequence parallelism, else T), I and O the
input and output features of the whole layer, o and i those of this rank.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from neomoba_dist.config import ParallelConfig
    from neomoba_dist.parallel.mesh import Mesh


class _Overlay:
    """A module seen through a few substituted names."""

    def __init__(self, base: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self.__dict__["_base"] = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def use_cpu_when_there_is_no_gpu() -> None:
    """Let the three megatron-core modules that we use allocate on the CPU. torch itself is not touched.

    They ask `torch.cuda.current_device()` for the device of their buffers, which fails in a CPU build.
    """
    if torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.utils as utils

    substitute = _Overlay(torch, cuda=_Overlay(torch.cuda, current_device=lambda: torch.device("cpu")))
    for module in (layers, mappings, utils):
        module.torch = substitute


def initialize_groups(parallel: "ParallelConfig") -> dict[str, torch.distributed.ProcessGroup]:
    """Build megatron-core's process groups (order tp-cp-ep-dp-pp) and return them by our axis names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six lines per rank on optional packages that we do not use
        from megatron.core import parallel_state

    use_cpu_when_there_is_no_gpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    return {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "model": parallel_state.get_model_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "expert_dp": parallel_state.get_expert_data_parallel_group(),
    }


def destroy_groups() -> None:
    """Undo `initialize_groups`, for tests that build several meshes in one process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def column_linear(x_SI: torch.Tensor, weight_oI: torch.Tensor, mesh: "Mesh") -> torch.Tensor:
    """x W^T with the output features split over tp. Returns [T, o].

    With sequence parallelism the tokens are gathered first and the input gradient is reduce-scattered; without it the
    input gradient is all-reduced. Only the shard of x is kept for the backward pass.
    """
    if mesh["tp"].size == 1:
        return F.linear(x_SI, weight_oI)
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


def row_linear(x_Ti: torch.Tensor, weight_Oi: torch.Tensor, mesh: "Mesh") -> torch.Tensor:
    """x W^T with the input features split over tp; the partial products are summed. Returns [S, O]."""
    return sum_over_tensor_parallel(F.linear(x_Ti, weight_Oi), mesh)


def sum_over_tensor_parallel(x_TH: torch.Tensor, mesh: "Mesh") -> torch.Tensor:
    """Add the partial results of the tp ranks: all-reduce, or reduce-scatter over tokens with sequence parallelism."""
    if mesh["tp"].size == 1:
        return x_TH
    from megatron.core.tensor_parallel import mappings

    # megatron-core reduces a copy and returns the original when the tensor is not contiguous
    x_TH = x_TH.contiguous()
    if mesh.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x_TH, group=mesh["tp"].group)
    return mappings.reduce_from_tensor_model_parallel_region(x_TH, group=mesh["tp"].group)


def enter_tensor_parallel(x_SH: torch.Tensor, mesh: "Mesh") -> torch.Tensor:
    """All tokens on every tp rank; the gradient is the sum of what the ranks contribute. Returns [T, H]."""
    if mesh["tp"].size == 1:
        return x_SH
    if mesh.sequence_parallel:
        from megatron.core.tensor_parallel import mappings

        return mappings.gather_from_sequence_parallel_region(x_SH, group=mesh["tp"].group)
    from neomoba_dist.parallel.comm import sum_gradient  # contiguous-safe, unlike megatron's copy mapping

    return sum_gradient(x_SH, mesh, "tp")
