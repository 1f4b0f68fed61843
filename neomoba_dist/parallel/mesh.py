"""The process mesh: world = tp x cp x pp x dp, with ep dividing dp x cp.

A `Mesh` is what the rest of the project knows of the machine: for each axis its size, this process's place in it and
the group to talk to. `Mesh.single()` is the mesh of ones on which every layer is plain torch.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from neomoba_dist.config import ParallelConfig
from neomoba_dist.config.context import ulysses_ranks
from neomoba_dist.parallel.groups import axis_ranks, make_groups, prepare_megatron
from neomoba_dist.parallel.ledger import Ledger

AXES = ("tp", "cp", "cp_heads", "cp_tokens", "pp", "dp", "dp_cp", "model", "ep", "expert_dp", "world")


@dataclass(frozen=True)
class Axis:
    """One axis as this process sees it: the global ranks along it and its own index among them."""

    size: int = 1
    index: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None  # None only on a mesh of ones


@dataclass(frozen=True)
class Mesh:
    """All axes, by name: `mesh["tp"].size`.

    "model" is tp x pp, "dp_cp" the group over which ZeRO shards, "expert_dp" the same for experts: dp_cp / ep, the
    ranks that hold copies of the same experts. cp = cp_heads x cp_tokens: neighbouring ranks that split KV heads, and
    what is left. The context_... fields say how tokens are dealt to cp and what its attention layers move
    (config.ParallelConfig).
    """

    axes: Mapping[str, Axis]
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_parallel: bool = False
    context_split: str = "block_cyclic"
    context_moba: str = "auto"
    context_full: str = "auto"
    ledger: Ledger = field(default_factory=Ledger, compare=False)

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]

    def record(self, axis: str, operation: str, num_bytes: int) -> AbstractContextManager[None]:
        """Around a collective of this rank: see `Ledger.record`. num_bytes: that it receives."""
        return self.ledger.record(self.rank, axis, self[axis].ranks, operation, num_bytes)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Mesh":
        """One process, no groups."""
        return cls(axes={name: Axis() for name in AXES}, device=torch.device(device))

    @classmethod
    def place(cls, parallel: ParallelConfig, world_size: int, rank: int, *, num_key_value_heads: int = 1) -> "Mesh":
        """Where a rank stands in a world that need not exist: no groups."""
        cp = parallel.context_parallel_size
        heads = ulysses_ranks(cp, max(1, num_key_value_heads // parallel.tensor_model_parallel_size))
        places = axis_ranks(parallel, world_size, rank, heads)
        axes = {name: Axis(len(ranks), ranks.index(rank), ranks) for name, ranks in places.items()}
        return cls(
            axes,
            rank,
            sequence_parallel=parallel.sequence_parallel and axes["tp"].size > 1,
            context_split=parallel.context_parallel_split,
            context_moba=parallel.context_parallel_moba,
            context_full=parallel.context_parallel_full,
        )

    @classmethod
    def build(
        cls, parallel: ParallelConfig, device: torch.device | str = "cpu", *, num_key_value_heads: int = 1
    ) -> "Mesh":
        """The mesh of the running process group, which must exist (`initialize_process_group`).

        num_key_value_heads: of the model; they decide how cp divides into cp_heads and cp_tokens.
        """
        if dist.get_world_size() == 1:
            return cls.single(device)
        mesh = cls.place(parallel, dist.get_world_size(), dist.get_rank(), num_key_value_heads=num_key_value_heads)
        if mesh["tp"].size > 1:
            prepare_megatron()
        groups = make_groups({name: axis.ranks for name, axis in mesh.axes.items()})
        axes = {name: replace(axis, group=groups[name]) for name, axis in mesh.axes.items()}
        return replace(mesh, axes=axes, device=torch.device(device), ledger=Ledger())

    @property
    def num_groups(self) -> int:
        """Process groups that this rank is a member of, the default group among them; 0 on a mesh of ones."""
        return len({axis.group for axis in self.axes.values()} - {None})


class DeepSpeedMPU:
    """What DeepSpeed asks of a "model parallel unit", answered from the mesh (Megatron's convention).

    The data-parallel group is dp x cp, because gradients are summed over both. There are deliberately no
    `get_sequence_parallel_*` methods: with them DeepSpeed scales gradients wrongly.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._tp, self._dp = mesh["tp"], mesh["dp_cp"]

    def get_model_parallel_rank(self) -> int:
        return self._tp.index

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tp.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._dp.index

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._dp.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._dp.ranks)


def rank_map(parallel: ParallelConfig, world_size: int) -> str:
    """A table of where every rank stands, one line per rank (only first and last ones of a large world)."""
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    ep, dp = parallel.expert_model_parallel_size, world_size // (tp * cp * pp)
    experts = f"; ep {ep} within dp x cp" if ep > 1 else ""
    lines = [f"world {world_size} = tp {tp} x cp {cp} x dp {dp} x pp {pp}{experts}", "rank  pp  dp  cp  tp"]
    lines[1] += "  ep" if ep > 1 else ""
    shown = range(world_size) if world_size <= 32 else [*range(16), *range(world_size - 16, world_size)]
    for rank in shown:
        rest, tp_index = divmod(rank, tp)
        rest, cp_index = divmod(rest, cp)
        pp_index, dp_index = divmod(rest, dp)
        ep_index = f" {(dp_index * cp + cp_index) % ep:3d}" if ep > 1 else ""
        lines.append(f"{rank:4d} {pp_index:3d} {dp_index:3d} {cp_index:3d} {tp_index:3d}{ep_index}")
        if world_size > 32 and rank == 15:
            lines.append(" ...")
    return "\n".join(lines)
