"""Start a mixture of experts from a dense checkpoint: sparse upcycling (arXiv 2212.05055).

Every expert begins as a copy of the layer's dense feed-forward part, the router with fresh weights. Where the weights
of a token's experts add up to one, the mixture first computes what the dense model did (`difference` tells where not);
the tokens that each expert gets then drive them apart. No file is converted: each rank reads its part of the dense
tensors, in any layout.
"""

from pathlib import Path

import torch

from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config, ModelConfig
from neomoba_dist.model.init import Initializer, ShardedTensorSpec
from neomoba_dist.parallel.mesh import Mesh


class UpcycledReader(CheckpointReader):
    """A dense checkpoint, read as that of the mixture that `config` describes; weights only.

    Raises CheckpointError where the layers do not fit.
    """

    def __init__(self, path: Path | str, config: Config) -> None:
        super().__init__(path)
        model, dense = config.model, self.config.model
        self._init = Initializer(Mesh.single(), config.phase.seed, model.initializer_range)
        problem = None
        if not model.num_experts:
            problem = "--upcycle makes experts, but neomoba.model.num_experts is 0; set it, or leave --upcycle out"
        elif dense.num_experts:
            problem = "holds a mixture of experts already; leave --upcycle out"
        elif dense.mlp_activation != "swiglu":
            problem = f"its layers are {dense.mlp_activation} ones, and experts are SwiGLU layers; leave --upcycle out"
        elif model.moe_intermediate_size != dense.intermediate_size:
            problem = (
                f"neomoba.model.moe_intermediate_size {model.moe_intermediate_size} is not the checkpoint's "
                f"intermediate_size {dense.intermediate_size}, and experts start as copies: set it to "
                f"{dense.intermediate_size}"
            )
        elif model.num_shared_experts:
            problem = "an upcycled mixture has no shared experts; set neomoba.model.num_shared_experts to 0"
        if problem:
            raise CheckpointError(f"{self.folder}: {problem}")

    def read(self, kind: str, shard: ShardedTensorSpec) -> torch.Tensor:
        layer, _, part = shard.name.partition(".mlp.")
        if part == "router.weight":
            return self._init.draw(shard)
        if part == "router.bias":
            return torch.zeros(shard.extent)
        if not part.startswith("experts."):
            return super().read(kind, shard)
        name = f"{layer}.mlp.{part.removeprefix('experts.')}"
        one = super().read(kind, ShardedTensorSpec(name, shard.shape[1:], shard.start[1:], shard.extent[1:]))
        return one.expand(shard.extent)


def difference(model: ModelConfig) -> str | None:
    """One line on why the mixture does not first compute what the dense model did; None if it does."""
    causes = []
    if not model.norm_topk_prob:
        causes.append("neomoba.model.norm_topk_prob is false")
    if model.routed_scaling_factor != 1:
        causes.append(f"neomoba.model.routed_scaling_factor is {model.routed_scaling_factor:g}")
    if model.moe_capacity_factor is not None and model.moe_overflow != "reroute":
        causes.append("neomoba.model.moe_capacity_factor leaves experts out")
    if not causes:
        return None
    return (
        f"warning: --upcycle: the mixture does not start with what the dense model computes, because the weights of a "
        f"token's experts do not add up to one: {', '.join(causes)}"
    )
