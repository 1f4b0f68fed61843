"""The ranks of every axis and their process groups; what megatron-core's tensor-parallel layers need to be told.

megatron-core is imported inside a function, and only where there is tensor parallelism: it takes two seconds and 200
MiB in every rank. Its `parallel_state` has every rank take part in making the groups of all ranks, thousands of them
in a large world; here a rank makes those that it is a member of, ten at most.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

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


def prepare_megatron() -> None:
    """What `megatron.core.tensor_parallel` needs once in a process; its functions are handed their group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six lines per rank on optional packages that we do not use
        from megatron.core import parallel_state

    use_cpu_when_there_is_no_gpu()
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def axis_ranks(parallel: ParallelConfig, world_size: int, rank: int, cp_heads: int) -> dict[str, tuple[int, ...]]:
    """The ranks along each axis through `rank`, in ascending order: tp is the fastest axis, then cp, dp and pp.

    cp_heads: neighbouring ranks of cp that split KV heads.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    world = torch.arange(world_size).view(pp, -1, cp, tp)
    p, d, c, t = (int(place) for place in (world == rank).nonzero()[0])
    context, data = world[p, d, :, t], world[p, :, :, t].flatten()
    place = d * cp + c
    heads, experts = context.view(-1, cp_heads), data.view(-1, ep)
    found = {
        "tp": world[p, d, c],
        "cp": context,
        "cp_heads": heads[c // cp_heads],
        "cp_tokens": heads[:, c % cp_heads],
        "pp": world[:, d, c, t],
        "dp": world[p, :, c, t],
        "dp_cp": data,
        "model": world[:, d, c].flatten(),
        "ep": experts[place // ep],
        "expert_dp": experts[:, place % ep],
        "world": world.flatten(),
    }
    return {axis: tuple(ranks.tolist()) for axis, ranks in found.items()}


def make_groups(ranks: Mapping[str, tuple[int, ...]]) -> dict[str, dist.ProcessGroup | None]:
    """A group for each axis; axes along the same ranks share one. All ranks call this, each for its own axes.

    "world" is the default group. Only members meet to make a group, and NCCL starts at its first collective: a device
    bound to the default group would have every rank take part in each of the groups that DeepSpeed makes.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for axis, members in ranks.items():
        if axis != "world" and members not in made:
            made[members] = dist.new_group(members, use_local_synchronization=True)
    return {axis: dist.group.WORLD if axis == "world" else made[members] for axis, members in ranks.items()}
