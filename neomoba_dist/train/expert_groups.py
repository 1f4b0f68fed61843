"""What DeepSpeed must know of experts of which every rank holds only some, and how the routers' biases move.

DeepSpeed finds such layers by its own MoE class (ZeRO 1 and 2) or by tags on their parameters (ZeRO 3), the groups over
which their gradients are reduced in module-level dictionaries, and their parameters in groups of their own. The engine
passes the class and the dictionaries in; measured in docs/moe.md.

Shape letters: L layers with experts, E experts.
"""

import math
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import Config, ConfigError, ModelConfig
from neomoba_dist.model.block import Block
from neomoba_dist.model.moe.layer import MoE, moe_layers
from neomoba_dist.model.moe.router import RECORD, update_bias
from neomoba_dist.parallel.context_split import padded_split
from neomoba_dist.parallel.mesh import Mesh


def declare_experts(module: nn.Module, mesh: Mesh, stage: int, marker: type[nn.Module], groups: Any) -> None:
    """Tell DeepSpeed of the experts of `module`; before the optimizer is built. Without ep they are like other weights.

    marker: deepspeed.moe.layer.MoE. groups: deepspeed.utils.groups.
    """
    if mesh["ep"].size == 1:
        return
    name = f"ep_size_{mesh['ep'].size}"
    for axis, kind in (("ep", "EXPERT_PARALLEL"), ("expert_dp", "EXPERT_DATA_PARALLEL")):
        getattr(groups, f"_{kind}_GROUP")[name] = mesh[axis].group
        getattr(groups, f"_{kind}_GROUP_RANKS")[name] = list(mesh[axis].ranks)
    marked = type("MoE", (MoE, marker), {"set_deepspeed_parallelism": _nothing_to_set})
    for layer in moe_layers(module):
        for parameter in layer.experts.parameters():
            tags: dict[str, Any] = {"allreduce": False, "group_name": name}
            if stage == 3:
                tags |= {
                    "ds_zero_placement_family": "autoep_expert",
                    "ds_zero_partition_group_name": name,
                    "ds_zero_partition_process_group": mesh["expert_dp"].group,
                }
            for key, value in tags.items():
                setattr(parameter, key, value)
        if stage < 3:  # at stage 3 DeepSpeed refuses its own class
            layer.__class__ = marked
            layer.num_experts = layer.config.num_experts  # type: ignore[assignment]


def check_rows(config: Config, mesh: Mesh) -> None:
    """Refuse rows so short that what pads a micro-batch over cp would count as one more. Raises ConfigError."""
    length, cp = config.phase.sequence_length, mesh["cp"].size
    if not config.model.moe_layers or cp == 1:
        return
    tokens = config.micro_batch_size * length
    padding = padded_split(tokens, mesh, config.model).num_tokens - tokens
    if padding >= length:
        even = cp * math.lcm(2 * config.model.moba_block_size, mesh["tp"].size)  # pads nothing
        raise ConfigError(
            f"neomoba.phase.sequence_length {length}: on {cp} context-parallel ranks a micro-batch is padded by "
            f"{padding} tokens, a row or more, which experts would count as one; set it to a multiple of {even}, or "
            "neomoba.parallel.context_parallel_size to less"
        )


def _nothing_to_set(layer: nn.Module, *unused: Any, **also_unused: Any) -> None:
    """DeepSpeed asks its layers to make their groups; ours exist."""


def update_biases(module: nn.Module, routing: torch.Tensor, config: ModelConfig) -> None:
    """Move the biases of a stage's routers. routing: float64 [L, 4 + E], see layer_stats.LayerStatistics.take."""
    if not config.router_bias_update_rate:
        return
    for block in module.modules():
        if isinstance(block, Block) and isinstance(block.mlp, MoE):
            demand = routing[config.moe_layers.index(block.index), len(RECORD) :]
            update_bias(block.mlp.router.bias, demand, config.router_bias_update_rate)
