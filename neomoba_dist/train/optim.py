"""AdamW (arXiv 1711.05101) over parameter groups, and the learning rate of every step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import PhaseConfig
from neomoba_dist.model.init import shard_of


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices get weight decay; norms and embeddings do not. Empty groups are left out (small pipeline stages).

    Experts that other ranks do not hold make a third group, whose name DeepSpeed knows (train/expert_groups.py).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    experts: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        if hasattr(parameter, "group_name"):
            experts.setdefault(parameter.group_name, []).append(parameter)
            continue
        shard = shard_of(parameter)
        is_matrix = len(shard.shape) >= 2 and not shard.name.startswith("embedding")
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": plain, "weight_decay": 0.0, "name": "no_decay"},
        *({"params": e, "weight_decay": weight_decay, "name": name, "moe": True} for name, e in experts.items()),
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, phase: PhaseConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW. Call after the module is on its device.

    Not apex's: it keeps the step in the parameter group, where neither an exact resume nor ZeRO-3 finds it.
    """
    groups = parameter_groups(module.parameters(), phase.weight_decay)
    betas = (phase.adam_beta1, phase.adam_beta2)
    return torch.optim.AdamW(groups, lr=phase.learning_rate, betas=betas, eps=phase.adam_eps, fused=True)


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Learning rate of update number `step` (1-based): linear warm-up, then the schedule down to the floor.

    cosine: arXiv 1608.03983 without restarts. wsd: constant, then linear over the last `decay_steps` (arXiv
    2404.06395, section 4). The last step of a decaying schedule has exactly the floor,
    `min_learning_rate_ratio * learning_rate`.
    """
    if step <= phase.warmup_steps:
        return phase.learning_rate * step / phase.warmup_steps
    floor = phase.learning_rate * phase.min_learning_rate_ratio
    start = phase.warmup_steps
    if phase.schedule == "wsd":
        decay = phase.decay_steps if phase.decay_steps is not None else max(1, phase.steps // 10)
        start = max(start, phase.steps - decay)
    if phase.schedule == "constant" or step <= start:
        return phase.learning_rate
    progress = min(1.0, (step - start) / max(1, phase.steps - start))
    if phase.schedule == "cosine":
        return floor + (phase.learning_rate - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return phase.learning_rate + (floor - phase.learning_rate) * progress
