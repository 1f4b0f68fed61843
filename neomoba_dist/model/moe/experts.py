"""The experts: SwiGLU layers (arXiv 2002.05202), each on the rows of its tokens.

Where all experts are on this rank, one operator takes tokens to experts and back (ops.py); experts on other ranks get
their rows by the all-to-alls of parallel/expert.py.

Shape letters: S tokens of this rank, H hidden size, K experts per token.
"""

import torch
from torch import Tensor, nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.moe.ops import mixture
from neomoba_dist.model.moe.swiglu import swiglu_by_expert
from neomoba_dist.parallel.expert import from_experts, plan_dispatch, to_experts


class Experts(nn.Module):
    """Tokens [S, H], their experts int64 [S, K] (DROPPED: none) and weights [S, K] -> weighted sums [S, H].

    Intermediate features are split over tp: the result is then this tp rank's part of a sum.
    """

    def __init__(self, name: str, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        assert intermediate is not None  # resolved by ModelConfig
        self.mesh, self.num_experts = init.mesh, config.num_experts
        wide, narrow = (config.num_experts, intermediate, hidden), (config.num_experts, hidden, intermediate)
        self.gate_proj = init.experts(f"{name}.gate_proj", wide, shard_dim=1)
        self.up_proj = init.experts(f"{name}.up_proj", wide, shard_dim=1)
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the dense layer's output
        self.down_proj = init.experts(f"{name}.down_proj", narrow, shard_dim=2, scale=scale)

    def forward(self, x_SH: Tensor, expert_SK: Tensor, weight_SK: Tensor, fill: int = 0) -> Tensor:
        """fill: rows that this rank brings every expert to, with empty ones; 0: none are added."""
        if self.mesh["ep"].size == 1 and not self.mesh.sequence_parallel:
            weights = (self.gate_proj, self.up_proj, self.down_proj)
            return mixture(x_SH, expert_SK, weight_SK, *weights, fill)[0]
        return self._elsewhere(x_SH, expert_SK, weight_SK, fill)

    @torch.compiler.disable  # the sizes of all-to-alls are numbers on the host
    def _elsewhere(self, x_SH: Tensor, expert_SK: Tensor, weight_SK: Tensor, fill: int) -> Tensor:
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        dispatch = plan_dispatch(expert_SK, self.num_experts, self.mesh, fill)
        rows = swiglu_by_expert(to_experts(x_SH, dispatch, self.mesh), *weights, dispatch.sizes)
        return from_experts(rows, weight_SK, dispatch, self.mesh)
