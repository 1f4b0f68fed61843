"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.tensor import column_linear, row_linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), intermediate features split over tp. x: [T, hidden_size].

    intermediate_size: where it is not the config's.
    """

    def __init__(
        self, name: str, config: ModelConfig, init: Initializer, *, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, intermediate_size or config.intermediate_size
        self.mesh = init.mesh
        # one matrix product, hence one gather and one gradient reduction for both
        wide = (intermediate, hidden)
        self.gate_up_proj = init.stacked({f"{name}.gate_proj": wide, f"{name}.up_proj": wide}, shard_dim=0)
        # residual outputs start smaller so that the stream's variance does not grow with depth (GPT-2, section 2.3)
        scale = (2 * config.num_hidden_layers) ** -0.5
        self.down_proj = init.weight(f"{name}.down_proj", (hidden, intermediate), shard_dim=1, scale=scale)

    def forward(self, x_SH: torch.Tensor) -> torch.Tensor:
        gate, up = column_linear(x_SH, self.gate_up_proj, self.mesh).chunk(2, dim=-1)
        return row_linear(F.silu(gate) * up, self.down_proj, self.mesh)
