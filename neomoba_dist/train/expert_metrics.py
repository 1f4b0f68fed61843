"""What the run log says of the experts, and the warning when one of them starves.

Shape letters: L layers with experts, E experts.
"""

from typing import Any

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.moe.router import RECORD

STARVED_SHARE, STARVED_STEPS = 0.05, 50


def routing_entry(routing: torch.Tensor, config: ModelConfig) -> dict[str, Any]:
    """Entries of metrics.jsonl of one step; lists have one item per layer with experts, in `config.moe_layers` order.

    routing: float64 [L, 4 + E], see layer_stats.LayerStatistics.take. tokens_per_expert: how many chose it, before any
    capacity; dropped_choices and rerouted_choices tell what became of them (a token makes num_experts_per_tok choices).
    kl_to_uniform: of the choices' distribution over the experts, nats. max_violation: choices of the busiest expert /
    mean - 1 (arXiv 2408.15664, section 4.1).
    """
    tokens, dropped, rerouted, entropy = routing[:, : len(RECORD)].unbind(1)
    rows_LE = routing[:, len(RECORD) :]
    share_LE = rows_LE / rows_LE.sum(1, keepdim=True).clamp(min=1)
    kl_L = torch.special.xlogy(share_LE, share_LE * config.num_experts).sum(1)
    violation_L = share_LE.amax(1) * config.num_experts - 1
    return {
        "tokens_per_expert": rows_LE.to(torch.int64).tolist(),
        "kl_to_uniform": kl_L.tolist(),
        "max_violation": violation_L.tolist(),
        "router_entropy": (entropy / tokens.clamp(min=1)).tolist(),
        "dropped_choices": int(dropped.sum()),
        "rerouted_choices": int(rerouted.sum()),
    }


class StarvationWatch:
    """Notices experts that get less than 5 % of a fair share for 50 steps on end; each is told of once."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.moe_layers
        self._steps = torch.zeros(len(self.layers), max(1, config.num_experts), dtype=torch.int64)

    def warnings(self, tokens_per_expert: list[list[int]]) -> list[str]:
        """One line per expert that has just starved for too long."""
        rows_LE = torch.tensor(tokens_per_expert, dtype=torch.float64)
        starved = rows_LE < STARVED_SHARE * rows_LE.mean(1, keepdim=True)
        self._steps = torch.where(starved, self._steps + 1, 0)
        return [
            f"warning: layer {self.layers[place]}: expert {expert} got less than {STARVED_SHARE:.0%} of its fair share "
            f"for {STARVED_STEPS} steps; raise neomoba.model.router_aux_loss_coef or router_bias_update_rate"
            for place, expert in (self._steps == STARVED_STEPS).nonzero().tolist()
        ]
