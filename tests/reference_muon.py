"""Muon by its formula, in one process and by singular value decompositions in float64: no line of train/muon.py."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from neomoba_dist.config import PhaseConfig
from neomoba_dist.model.init import views_of
from neomoba_dist.train.optim import parameter_groups

DECAY = 0.95  # of the momentum


def near_one(matrix: Tensor) -> Tensor:
    """A matrix with its singular vectors, and each singular value sent five times through the odd polynomial."""
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


class PlainMuon:
    """Matrices in blocks by Muon in its heavy-ball form, the rest by torch's AdamW."""

    def __init__(self, module: nn.Module, phase: PhaseConfig, rate: float) -> None:
        linear, *rest = parameter_groups(module.parameters(), phase.weight_decay, "muon")
        self.linear, self.rate, self.weight_decay = linear["params"], rate, phase.weight_decay
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.adamw = torch.optim.AdamW(rest, lr=rate, betas=(phase.adam_beta1, phase.adam_beta2))

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for parameter in self.linear:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for parameter in self.linear:
            views = zip(views_of(parameter), views_of(parameter, parameter.grad), strict=True)
            for (spec, weight), (_, gradient) in views:
                for number, (one, g) in enumerate(zip(*map(matrices, (weight, gradient)), strict=True)):
                    key = (spec.name, number)
                    self.sums[key] = total = DECAY * self.sums.get(key, torch.zeros_like(g)) + g
                    update = 0.2 * math.sqrt(max(g.shape)) * near_one(g + DECAY * total)
                    one -= self.rate * (update + self.weight_decay * one)


def matrices(tensor: Tensor) -> tuple[Tensor, ...]:
    """A matrix, or a stack of them, as views of two dimensions."""
    return tensor.unbind(0) if tensor.dim() == 3 else (tensor,)


def plain_optimizer(module: nn.Module, phase: PhaseConfig, rate: float) -> Any:
    """The optimizer of a plain loop."""
    if phase.optimizer == "muon":
        return PlainMuon(module, phase, rate)
    groups = parameter_groups(module.parameters(), phase.weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=(phase.adam_beta1, phase.adam_beta2))


def first_share(phase: PhaseConfig, name: str) -> float:
    """Of the first gradient in the first moment of a tensor."""
    return 1 - (DECAY if phase.optimizer == "muon" and name.endswith("_proj") else phase.adam_beta1)
