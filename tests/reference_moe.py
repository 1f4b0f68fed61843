"""A mixture of experts by loops over tokens, in float64: independent of every line of neomoba_dist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Reference:
    """output [T, H], auxiliary loss [], and counts of choices.

    asked: the router's own choices of each expert. dropped: choices without an expert. rerouted: of a later expert.
    """

    output: Tensor
    aux_loss: Tensor
    asked: list[int]
    dropped: int
    rerouted: int


def swiglu(x_H: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = gate @ x_H
    return down @ (hidden * torch.sigmoid(hidden) * (up @ x_H))


def ranked_experts(scores: list[float], bias: list[float], config: Any) -> list[int]:
    """All experts that the token may use, best first."""
    wanted = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(wanted) // config.n_group
    groups = [wanted[g * size : (g + 1) * size] for g in range(config.n_group)]
    best = 2 if config.router_scoring == "sigmoid" else 1
    values = [sum(sorted(group)[-best:]) for group in groups]
    allowed = sorted(range(config.n_group), key=values.__getitem__)[-config.topk_group :]
    experts = [e for g in allowed for e in range(g * size, (g + 1) * size)]
    return sorted(experts, key=wanted.__getitem__, reverse=True)


def mixture(x_TH: Tensor, valid: list[bool], weights: dict[str, Tensor], config: Any, row_length: int) -> Reference:
    """weights: router.weight, router.bias, experts.*, shared.* as the layer names them."""
    num_experts, top_k = config.num_experts, config.num_experts_per_tok
    bias = weights["router.bias"].tolist()
    outputs, aux_losses = [], []
    asked, dropped, rerouted = [0] * num_experts, 0, 0
    for start in range(0, len(x_TH), row_length):
        room = [math.inf] * num_experts
        if config.moe_capacity_factor is not None:
            fair = row_length * top_k / num_experts
            room = [max(1, round(config.moe_capacity_factor * fair))] * num_experts
        preferred = [0] * num_experts  # by scores alone: neither bias nor groups
        mass = torch.zeros(num_experts, dtype=x_TH.dtype)
        z, tokens = torch.zeros((), dtype=x_TH.dtype), 0
        for t in range(start, start + row_length):
            output = torch.zeros_like(x_TH[t])
            if config.num_shared_experts:
                output = swiglu(x_TH[t], *weights["shared.gate_up_proj"].chunk(2), weights["shared.down_proj"])
            if valid[t]:
                logits = weights["router.weight"] @ x_TH[t]
                scores = logits.softmax(0) if config.router_scoring == "softmax" else torch.sigmoid(logits)
                mass = mass + scores / scores.sum()
                z, tokens = z + torch.logsumexp(logits, 0) ** 2, tokens + 1
                for expert in sorted(range(num_experts), key=scores.tolist().__getitem__)[-top_k:]:
                    preferred[expert] += 1
                ranked = ranked_experts(scores.tolist(), bias, config)
                first = ranked[:top_k]
                for expert in first:
                    asked[expert] += 1
                if config.moe_overflow == "reroute":
                    chosen = [expert for expert in ranked if room[expert] > 0][:top_k]
                    taken = chosen
                else:
                    chosen, taken = first, [expert for expert in first if room[expert] > 0]
                total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
                for expert in taken:
                    room[expert] -= 1
                    rerouted += expert not in first
                    share = scores[expert] / total * config.routed_scaling_factor
                    parts = (weights[f"experts.{n}_proj"][expert] for n in ("gate", "up", "down"))
                    output = output + share * swiglu(x_TH[t], *parts)
                dropped += top_k - len(taken)
            outputs.append(output)
        tokens = max(tokens, 1)
        balance = num_experts * sum(n / tokens / top_k * m / tokens for n, m in zip(preferred, mass, strict=True))
        aux_losses.append(config.router_aux_loss_coef * balance + config.router_z_loss_coef * z / tokens)
    return Reference(torch.stack(outputs), sum(aux_losses) / len(aux_losses), asked, dropped, rerouted)
