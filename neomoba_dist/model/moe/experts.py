"""The experts: SwiGLU layers (arXiv 2002.05202), each on the rows of its tokens.

Where all experts are on this rank, one operator takes tokens to experts and back (ops.py); experts on other ranks get
their rows by the all-to-alls of parallel/expert.py. While rows are on their way, shared experts compute.

Shape letters: S tokens of this rank, H hidden size, K experts per token.
"""

import torch
from torch import Tensor, nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.moe.ops import mixture
from neomoba_dist.model.moe.swiglu import swiglu_by_expert
from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.expert import Dispatch, at_experts, from_experts, plan_dispatch, send_to_experts
from neomoba_dist.parallel.tensor import enter_tensor_parallel, sum_over_tensor_parallel
from neomoba_dist.parallel.transfers import RowTransfer


class Experts(nn.Module):
    """Tokens [S, H], their experts int64 [S, K] (DROPPED: none) and weights [S, K] -> weighted sums [S, H].

    Intermediate features are split over tp.
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

    def forward(
        self, x_SH: Tensor, expert_SK: Tensor, weight_SK: Tensor, fill: int = 0, shared: nn.Module | None = None
    ) -> Tensor:
        """fill: rows that this rank brings every expert to, with empty ones; 0: none are added. shared: what every
        token goes through besides; its result is added."""
        mesh, entered_SH = self.mesh, x_SH
        if not mesh.sequence_parallel:
            # every tp rank sends all tokens to its part of the experts; what comes back is its part of a sum
            entered_SH, weight_SK = enter_tensor_parallel(x_SH, mesh), sum_gradient(weight_SK, mesh, "tp")
        are_here = mesh["ep"].size == 1 and not mesh.sequence_parallel
        sent = None if are_here else self._send(entered_SH, expert_SK, fill)
        shared_SH = None if shared is None else shared(x_SH)  # beside what was sent, in the backward pass its gradients
        if sent is None:
            weights = (self.gate_proj, self.up_proj, self.down_proj)
            y_SH = mixture(entered_SH, expert_SK, weight_SK, *weights, fill)[0]
        else:
            y_SH = self._receive(*sent, weight_SK)
        if not mesh.sequence_parallel:
            y_SH = sum_over_tensor_parallel(y_SH, mesh)
        return y_SH if shared_SH is None else y_SH + shared_SH

    @torch.compiler.disable  # the sizes of all-to-alls are numbers on the host
    def _send(self, x_SH: Tensor, expert_SK: Tensor, fill: int) -> tuple[Dispatch, RowTransfer]:
        dispatch = plan_dispatch(expert_SK, self.num_experts, self.mesh, fill)
        return dispatch, send_to_experts(x_SH, dispatch, self.mesh)

    @torch.compiler.disable  # the same
    def _receive(self, dispatch: Dispatch, sent: RowTransfer, weight_SK: Tensor) -> Tensor:
        rows = at_experts(sent, dispatch, self.mesh)
        rows = swiglu_by_expert(rows, self.gate_proj, self.up_proj, self.down_proj, dispatch.sizes)
        return from_experts(rows, weight_SK, dispatch, self.mesh)
