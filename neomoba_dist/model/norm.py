"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.optional import apex_rms_norm, is_available
from neomoba_dist.parallel.comm import sum_gradient


class Norm(nn.Module):
    """Over the last dimension, in the input's dtype.

    partial: each tp rank norms other data (tokens under sequence parallelism, heads for QK-norm), so the weights'
    gradients are summed over tp.
    """

    def __init__(self, name: str, size: int, eps: float, init: Initializer, partial: bool) -> None:
        super().__init__()
        self.weight = init.ones(f"{name}.weight", size)
        self.eps = eps
        self.mesh = init.mesh
        self.partial = partial

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter, with all of its gradient."""
        return sum_gradient(parameter, self.mesh, "tp") if self.partial else parameter


class RMSNorm(Norm):
    """x / rms(x) * weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.whole(self.weight)
        # compiled, it is one kernel with what stands around it
        if x.is_cuda and not torch.compiler.is_compiling() and is_available("apex_norm"):
            return apex_rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

    def __init__(self, name: str, size: int, eps: float, init: Initializer, partial: bool) -> None:
        super().__init__(name, size, eps, init, partial)
        self.bias = init.weight(f"{name}.bias", (size,), scale=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.whole(self.weight), self.whole(self.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class LayerNormWithoutBias(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight, as in ModernBERT (arXiv 2412.13663, section 2.1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.whole(self.weight)
        return F.layer_norm(x, weight.shape, weight, None, self.eps)


NORMS: dict[str, type[Norm]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "layernorm_no_bias": LayerNormWithoutBias,
}


def residual_norm(name: str, config: ModelConfig, init: Initializer) -> Norm:
    """The norm that the config asks for, of the residual stream."""
    partial = init.mesh.sequence_parallel
    return NORMS[config.norm](name, config.hidden_size, config.rms_norm_eps, init, partial=partial)


class EmbeddingNorm(nn.Module):
    """A norm of what enters the first block, as in BERT and ModernBERT: State -> State (model/block.py)."""

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.norm = residual_norm("embedding_norm", config, init)

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = state
        return self.norm(hidden), *rest
