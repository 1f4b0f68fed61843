"""The process groups, made by megatron-core, which is imported inside the functions: it takes seconds."""

import warnings
from typing import Any

import torch

from neomoba_dist.config import ParallelConfig


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


def initialize_groups(parallel: ParallelConfig) -> dict[str, torch.distributed.ProcessGroup]:
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
