"""Mixture of experts: the feed-forward part of a block, where every token goes through a few of many SwiGLU layers.

The router chooses (router.py), experts compute (experts.py), on this rank or where all-to-alls bring tokens. Shared
experts, which every token passes, are one wider dense layer.

Shape letters: S tokens of this rank, H hidden size, T tokens of its shard of the sequence, E experts.
"""

from collections.abc import Iterator

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer, ShardedTensorSpec
from neomoba_dist.model.mlp import SwiGLU
from neomoba_dist.model.moe.experts import Experts
from neomoba_dist.model.moe.router import Router
from neomoba_dist.model.moe.tokens import Tokens


class MoE(nn.Module):
    """x [S, H] -> [S, H]. index: of its layer. row_length: tokens of a training row; None: a micro-batch is one row."""

    def __init__(
        self, name: str, index: int, config: ModelConfig, init: Initializer, *, row_length: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.row_length = config, init.mesh, row_length
        self.router = Router(f"{name}.router", index, config, init)
        self.experts = Experts(f"{name}.experts", config, init)
        self.shared: SwiGLU | None = None
        if config.num_shared_experts:
            assert config.moe_intermediate_size is not None  # resolved by ModelConfig
            width = config.num_shared_experts * config.moe_intermediate_size
            self.shared = SwiGLU(f"{name}.shared", config, init, intermediate_size=width)

    def forward(
        self, x_SH: torch.Tensor, position_ids_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the output, the auxiliary loss [] and the record of the routing (router.RECORD), float64 [4 + E].

        position_ids_T: -1 for padding, which goes to no expert.
        """
        tokens = Tokens.of(position_ids_T, len(x_SH), self.row_length, self.mesh, self.config, training=self.training)
        expert_SK, weight_SK, aux_loss, record = self.router(x_SH, tokens)
        y_SH = self.experts(x_SH, expert_SK, weight_SK, self.router.fill(tokens), self.shared)
        return y_SH, aux_loss, record


def moe_layers(module: nn.Module) -> list[MoE]:
    """The mixtures of a model or pipeline stage, first layer first."""
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


def saved_buffers(module: nn.Module) -> Iterator[tuple[ShardedTensorSpec, torch.Tensor]]:
    """What belongs into a checkpoint though no optimizer moves it: the routers' biases."""
    for layer in moe_layers(module):
        yield layer.router.bias_shard, layer.router.bias
