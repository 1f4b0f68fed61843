"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.optional import apex_rms_norm, is_available
from neomoba_dist.parallel.comm import sum_gradient


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the input's dtype.

    partial: each tp rank norms other data (tokens under sequence parallelism, heads for QK-norm), so the weight's
    gradient is summed over tp.
    """

    def __init__(self, name: str, size: int, eps: float, init: Initializer, partial: bool) -> None:
        super().__init__()
        self.weight = init.ones(f"{name}.weight", size)
        self.eps = eps
        self.mesh = init.mesh
        self.partial = partial

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.partial else self.weight
        # compiled, it is one kernel with what stands around it
        if x.is_cuda and not torch.compiler.is_compiling() and is_available("apex_norm"):
            return apex_rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension. partial: see `RMSNorm`."""

    def __init__(self, name: str, size: int, eps: float, init: Initializer, partial: bool) -> None:
        super().__init__()
        self.weight = init.ones(f"{name}.weight", size)
        self.bias = init.weight(f"{name}.bias", (size,), scale=0.0)
        self.eps = eps
        self.mesh = init.mesh
        self.partial = partial

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self.weight, self.bias
        weight, bias = (sum_gradient(p, self.mesh, "tp") if self.partial else p for p in parameters)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class LayerNormWithoutBias(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight over the last dimension, as in ModernBERT (arXiv 2412.13663, section
    2.1). partial: see `RMSNorm`."""

    def __init__(self, name: str, size: int, eps: float, init: Initializer, partial: bool) -> None:
        super().__init__()
        self.weight = init.ones(f"{name}.weight", size)
        self.eps = eps
        self.mesh = init.mesh
        self.partial = partial

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.partial else self.weight
        return F.layer_norm(x, weight.shape, weight, None, self.eps)


Norm = RMSNorm | LayerNorm | LayerNormWithoutBias
NORMS: dict[str, type[RMSNorm] | type[LayerNorm] | type[LayerNormWithoutBias]] = {
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
