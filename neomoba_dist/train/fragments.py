"""Where this rank's parts of the parameters lie in the flat float32 partitions that DeepSpeed's ZeRO makes.

ZeRO lays the parameters of a group end to end and gives every rank of dp x cp (experts: of expert_dp) one piece of the
whole: stages 1 and 2 the same piece of the group, stage 3 the same piece of each parameter.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from neomoba_dist.model.init import Part, ShardedTensorSpec, parts_of, shard_of
from neomoba_dist.parallel.mesh import Mesh


class Fragment(NamedTuple):
    """Elements start..start + numel of a flattened part of a parameter: `offset` .. in the partition `flat`."""

    parameter: nn.Parameter
    part: Part
    start: int
    numel: int
    flat: torch.Tensor  # float32, what the optimizer steps
    offset: int

    @property
    def shard(self) -> ShardedTensorSpec:
        """Of the part."""
        return self.part.shard

    @property
    def valid(self) -> int:
        """How many of the elements are no padding; those come first."""
        return max(0, min(self.numel, math.prod(self.shard.extent) - self.start))


def is_copy(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this is a copy of what another rank of tp, or another pipeline stage, saves and counts."""
    on_other_rank = "tp" not in shard_of(parameter).axes and mesh["tp"].index > 0
    return on_other_rank or getattr(parameter, "ds_pipe_replicated", False)


def by_part(parameter: nn.Parameter, start: int, numel: int, flat: torch.Tensor, offset: int) -> Iterator[Fragment]:
    """The elements start..start + numel of a flattened parameter, part by part; what is beyond it goes to the last."""
    *others, last = parts_of(parameter)
    for part, stop in (*((part, part.stop) for part in others), (last, start + numel)):
        first, end = max(start, part.first), min(start + numel, stop)
        if first < end:
            yield Fragment(parameter, part, first - part.first, end - first, flat, offset + first - start)


def flat_partitions(zero: Any, stage: int) -> list[torch.Tensor]:
    """The flat fp32 tensors that the optimizer really steps. zero: DeepSpeed's ZeRO optimizer."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def partition_groups(zero: Any, stage: int) -> list[dict[str, Any]]:
    """Of every one of these the parameter group of the optimizer that it belongs to."""
    groups = zero.optimizer.param_groups
    if stage < 3:
        return groups
    return [groups[zero.sub_group_to_group_id[number]] for number in range(len(flat_partitions(zero, stage)))]


def fragments(parameters: Iterable[nn.Parameter], zero: Any, stage: int, mesh: Mesh) -> Iterator[Fragment]:
    """This rank's fragments of every parameter, in the order given; none of those that lie on other ranks wholly.

    At stage 3 the last one may end in padding.
    """
    flats = flat_partitions(zero, stage)
    for parameter in parameters:
        found: Any = parameter
        if stage == 3:
            group, offset, _ = zero.grad_position[zero.get_param_id(found)]
            numel = found.ds_tensor.numel()
            rank = mesh["expert_dp" if "ep" in shard_of(parameter).axes else "dp_cp"].index
            yield from by_part(parameter, numel * rank, numel, flats[group], offset)
        elif found._hp_mapping is not None:
            mapping = found._hp_mapping
            local, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            yield from by_part(parameter, local.start, local.numel, flat, partition.start)
