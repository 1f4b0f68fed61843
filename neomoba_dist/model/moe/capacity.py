"""The choice of experts, with and without a limit on what each takes of a row.

With a limit, earlier tokens come first, so that a causal model's choice depends on no later token. Ranks that share a
row agree by looking at the scores of all its tokens.

Shape letters: T tokens of the micro-batch, S those of this rank, L tokens of a row, E experts, K experts per token.
"""

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.parallel.expert_rows import DROPPED
from neomoba_dist.parallel.mesh import Mesh


def choose(wanted_SE: torch.Tensor, count: int, valid_S: torch.Tensor) -> torch.Tensor:
    """The `count` best experts of every token, best first: int64 [S, K], DROPPED for padding and for scores of -inf."""
    best, expert_SK = wanted_SE.topk(count, dim=1)
    return torch.where((best > -torch.inf) & valid_S[:, None], expert_SK, DROPPED)


def choose_within_capacity(
    wanted_SE: torch.Tensor, tokens: Tokens, mesh: Mesh, config: ModelConfig, capacity: int
) -> torch.Tensor:
    """The same where an expert takes `capacity` tokens of a row; what is beyond is DROPPED or, rerouted, goes on.

    With `moe_overflow` "reroute" the result is that of serving the tokens of a row one after the other, each with its
    best experts that still have room: tokens ask all at once, experts refuse all but the earliest, and who was refused
    asks the next expert, until nobody is refused (stable matching with one common priority has one solution).
    """
    wanted_TE = tokens.gather(wanted_SE, mesh)
    valid_T = tokens.gather(tokens.valid_S, mesh)
    while True:
        expert_TK = choose(wanted_TE, config.num_experts_per_tok, valid_T)
        refused_TE = _beyond(expert_TK, wanted_TE.shape[1], tokens, capacity)
        if config.moe_overflow != "reroute":
            refused_TK = refused_TE.gather(1, expert_TK.clamp(min=0))
            expert_TK = torch.where(refused_TK, DROPPED, expert_TK)
            break
        if not refused_TE.any():
            break
        wanted_TE = wanted_TE.masked_fill(refused_TE, -torch.inf)
    # beyond the last row lies what pads the micro-batch over cp
    return torch.where(tokens.valid_S[:, None], expert_TK[tokens.number_S.clamp(max=len(expert_TK) - 1)], DROPPED)


def asked_experts(expert_SK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [S, E]: 1 where the token asks the expert, else 0. expert_SK: of DROPPED nothing is counted."""
    asked = torch.zeros(len(expert_SK), num_experts + 1, dtype=torch.int32, device=expert_SK.device)
    return asked.scatter_(1, torch.where(expert_SK < 0, num_experts, expert_SK), 1)[:, :num_experts]


def _beyond(expert_TK: torch.Tensor, num_experts: int, tokens: Tokens, capacity: int) -> torch.Tensor:
    """bool [T, E]: the token asks the expert, but `capacity` earlier tokens of its row do too."""
    asked = asked_experts(expert_TK, num_experts)
    queue = asked.unflatten(0, (tokens.rows, tokens.length)).cumsum(1).flatten(0, 1)
    return (asked > 0) & (queue > capacity)
