"""AdamW (arXiv 1711.05101), or Muon and AdamW, over parameter groups; and the learning rate of every step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.config import PhaseConfig
from neomoba_dist.model.init import shard_of
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.fragments import Fragment
from neomoba_dist.train.muon import Muon


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """Matrices get weight decay; norms and embeddings do not. Empty groups are left out (small pipeline stages).

    Experts that other ranks do not hold make a group of their own, whose name DeepSpeed knows (train/expert_groups.py).
    With optimizer "muon" the linear maps inside blocks, whose names end in _proj, are in groups that say
    "orthogonalised"; not so the embeddings, the head, routers, and tables that only look like matrices.
    """
    muon: dict[str, Any] = {"orthogonalised": True} if optimizer == "muon" else {}
    linear: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    experts: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        if hasattr(parameter, "group_name"):
            experts.setdefault(parameter.group_name, []).append(parameter)
            continue
        shard = shard_of(parameter)
        is_matrix = len(shard.shape) >= 2 and not shard.name.startswith("embedding")
        if muon and shard.name.endswith("_proj"):
            linear.append(parameter)
        else:
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": linear, "weight_decay": weight_decay, "name": "linear", **muon},
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": plain, "weight_decay": 0.0, "name": "no_decay"},
        *(
            {"params": held, "weight_decay": weight_decay, "name": name, "moe": True, **muon}
            for name, held in experts.items()
        ),
    ]
    return [group for group in groups if group["params"]]


def moments_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds of the moments that the optimizer keeps of the parameters of a group."""
    return KINDS[1:2] if group.get("orthogonalised") else KINDS[1:]


def adamw(module: nn.Module, phase: PhaseConfig) -> torch.optim.AdamW:
    """torch's fused AdamW. Call after the module is on its device.

    Not apex's: it keeps the step in the parameter group, where neither an exact resume nor ZeRO-3 finds it.
    """
    return torch.optim.AdamW(parameter_groups(module.parameters(), phase.weight_decay), **_adamw_settings(phase))


def build_optimizer(
    module: nn.Module, phase: PhaseConfig, mesh: Mesh, fragments: Callable[[], Iterable[Fragment]]
) -> torch.optim.Optimizer:
    """That of the phase. Call after the module is on its device.

    fragments: where this rank's parts of the parameters lie; asked once DeepSpeed has laid them out.
    """
    if phase.optimizer == "adamw":
        return adamw(module, phase)
    groups = parameter_groups(module.parameters(), phase.weight_decay, phase.optimizer)
    return Muon(groups, mesh, fragments, **_adamw_settings(phase))


def _adamw_settings(phase: PhaseConfig) -> dict[str, Any]:
    betas = (phase.adam_beta1, phase.adam_beta2)
    return {"lr": phase.learning_rate, "betas": betas, "eps": phase.adam_eps, "fused": True}


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
