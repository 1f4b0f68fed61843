"""RMSNorm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import nn

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
        if x.is_cuda and is_available("apex_norm"):
            return apex_rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)
