"""What stands between the last norm and the output matrix of BERT's heads (arXiv 1810.04805), as ModernBERT has it."""

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.norm import residual_norm
from neomoba_dist.parallel.comm import sum_gradient


class PredictionHead(nn.Module):
    """norm(gelu(x W^T)), [S, H] -> [S, H]: a square matrix without bias, the exact GELU, and the model's kind of norm.

    Every tp rank holds all of it and computes its own tokens: with sequence parallelism a part of them, so that the
    gradients are summed over tp.
    """

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.mesh = init.mesh
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the outputs of a block
        self.dense = init.weight("head.dense", (config.hidden_size, config.hidden_size), scale=scale)
        self.norm = residual_norm("head.norm", config, init)

    def forward(self, x_SH: torch.Tensor) -> torch.Tensor:
        weight = sum_gradient(self.dense, self.mesh, "tp") if self.mesh.sequence_parallel else self.dense
        return self.norm(F.gelu(F.linear(x_SH, weight)))
