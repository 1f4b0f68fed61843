"""Which experts a token goes to, with which weight, and the losses that keep the experts busy.

Scores and choice (docs/moe.md has the formulas): softmax as in Switch (arXiv 2101.03961, section 2.1), Mixtral (arXiv
2401.04088, section 2.1; its softmax over the chosen logits is `norm_topk_prob`) and Qwen3-MoE; sigmoid with a bias that
only the choice sees, and groups of experts, as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). All in float32 at
least, whatever the model's dtype.

Shape letters: T tokens of the micro-batch, S those of this rank, L tokens of a row, H hidden size, E experts, K experts
per token.
"""

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer, ShardedTensorSpec
from neomoba_dist.model.moe.balance import auxiliary_loss, sums_of_rows
from neomoba_dist.model.moe.fp32_linear import exact_linear
from neomoba_dist.model.moe.router_ops import route_tokens, rows_in_order
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.expert_rows import DROPPED, choice_mask, top_experts
from neomoba_dist.parallel.mesh import Mesh

RECORD = ("tokens", "dropped", "rerouted", "entropy")  # what a record holds before the demand for each expert


# A plain tuple, because ZeRO-3 gathers a module's weights for the backward pass only where it finds tensors in a tuple:
# experts int64 [S, K] (DROPPED: none), weights [S, K], what the losses add to the training loss [], record [4 + E].
Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Router(nn.Module):
    """Scores of all experts for every token: one product with `weight` [E, H].

    bias: float32 [E], added to the scores for the choice alone; moved after every update by `update_bias`.
    """

    bias: torch.Tensor
    key: torch.Tensor

    def __init__(self, name: str, index: int, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.config, self.mesh = config, init.mesh
        self.weight = init.weight(f"{name}.weight", (config.num_experts, config.hidden_size))
        self.bias_shard = ShardedTensorSpec(f"{name}.bias", (config.num_experts,))
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        # of the jitter: seed, step, index of the layer; a tensor, so that a compiled graph serves all steps and layers
        self.register_buffer("key", torch.tensor([init.seed, 0, index]), persistent=False)

    def set_step(self, step: int) -> None:
        """The step of training that runs next."""
        self.key[1] = step

    def forward(self, x_SH: torch.Tensor, tokens: Tokens) -> Routing:
        config = self.config
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.mesh.sequence_parallel else self.weight
        if self.training and config.router_jitter:
            exact = torch.promote_types(x_SH.dtype, torch.float32)
            x_SH = x_SH.to(exact) * tokens.noise(x_SH.shape[1], config.router_jitter, self.key).to(exact)
        logits_SE = exact_linear(x_SH, weight)
        has_loss = self.training and bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        capacity = expert_capacity(config, tokens) if self.training else 0
        rows = rows_in_order(logits_SE, tokens, config, self.mesh)
        if rows and not capacity and config.topk_group == config.n_group:
            expert_SK, weight_SK, sums, record = route_tokens(
                logits_SE,
                self.bias,
                tokens.valid_S,
                rows,
                config.num_experts_per_tok,
                config.router_scoring == "sigmoid",
                config.norm_topk_prob,
                config.routed_scaling_factor,
            )
            aux_loss = auxiliary_loss(sums, config, self.mesh) if has_loss else logits_SE.new_zeros(())
            return expert_SK, weight_SK, aux_loss, record.detach()
        scores_SE = logits_SE.softmax(-1) if config.router_scoring == "softmax" else logits_SE.sigmoid()
        expert_SK, first_SK, weight_SK = self._choose(scores_SE, tokens, capacity)
        prob_SE = scores_SE if config.router_scoring == "softmax" else scores_SE / scores_SE.sum(-1, keepdim=True)
        aux_loss = scores_SE.new_zeros(())
        if has_loss:
            aux_loss = auxiliary_loss(sums_of_rows(logits_SE, prob_SE, tokens, config), config, self.mesh)
        return expert_SK, weight_SK, aux_loss, make_record(prob_SE, expert_SK, first_SK, tokens)

    def _choose(
        self, scores_SE: torch.Tensor, tokens: Tokens, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Experts that take the token, those it chose before any capacity, and weights of the former; all [S, K]."""
        config = self.config
        scores_for_choice_SE = limit_groups(scores_SE.detach() + self.bias, config)
        expert_SK = first_SK = top_experts(scores_for_choice_SE, config.num_experts_per_tok, tokens.valid_S)
        if capacity:
            expert_SK = choose_within_capacity(scores_for_choice_SE, tokens, self.mesh, config, capacity)
        # a dropped choice keeps its share of the sum, a rerouted one is replaced
        summed_SK = expert_SK if config.moe_overflow == "reroute" else first_SK
        weight_SK = torch.where(summed_SK == DROPPED, 0, scores_SE.gather(1, summed_SK.clamp(min=0)))
        if config.norm_topk_prob:
            weight_SK = weight_SK / (weight_SK.sum(-1, keepdim=True) + torch.finfo(scores_SE.dtype).tiny)
        weight_SK = torch.where(expert_SK == DROPPED, 0, weight_SK * config.routed_scaling_factor)
        return expert_SK, first_SK, weight_SK

    def fill(self, tokens: Tokens) -> int:
        """Rows that this rank brings every expert to, with empty ones; 0: none are added.

        No more than the tokens of a row that it holds: ranks that share a row together send up to their number times
        the capacity.
        """
        if self.config.moe_overflow != "pad" or not self.training:
            return 0
        return min(expert_capacity(self.config, tokens), tokens.here_of_row) * tokens.rows


def limit_groups(scores_SE: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """-inf for experts outside the token's `topk_group` best of `n_group` groups.

    A group is as good as its best expert (softmax, DeepSeek-V2, arXiv 2405.04434, section 2.1.2), or as its two best
    together (sigmoid, DeepSeek-V3).
    """
    if config.topk_group == config.n_group:
        return scores_SE
    groups = scores_SE.unflatten(1, (config.n_group, -1))
    best = min(2 if config.router_scoring == "sigmoid" else 1, groups.shape[2])
    chosen = groups.topk(best, dim=2).values.sum(2).topk(config.topk_group, dim=1).indices
    allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter_(1, chosen, True)
    return groups.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)


def expert_capacity(config: ModelConfig, tokens: Tokens) -> int:
    """Most tokens of a row that one expert takes; 0: all that come."""
    if config.moe_capacity_factor is None:
        return 0
    fair = tokens.length * config.num_experts_per_tok / config.num_experts
    return max(1, round(config.moe_capacity_factor * fair))


def choose_within_capacity(
    scores_SE: torch.Tensor, tokens: Tokens, mesh: Mesh, config: ModelConfig, capacity: int
) -> torch.Tensor:
    """`top_experts` where an expert takes `capacity` tokens of a row; what is beyond is DROPPED or, rerouted, goes on.

    Earlier tokens come first, so that a causal model's choice depends on no later token. Ranks that share a row agree
    by looking at the scores of all its tokens [T, E].

    With `moe_overflow` "reroute" the result is that of serving the tokens of a row one after the other, each with its
    best experts that still have room: tokens ask all at once, experts refuse all but the earliest, and who was refused
    asks the next expert, until nobody is refused (stable matching with one common priority has one solution).
    """
    scores_TE = tokens.gather(scores_SE, mesh)
    valid_T = tokens.gather(tokens.valid_S, mesh)
    while True:
        expert_TK = top_experts(scores_TE, config.num_experts_per_tok, valid_T)
        refused_TE = _beyond(expert_TK, scores_TE.shape[1], tokens, capacity)
        if config.moe_overflow != "reroute":
            refused_TK = refused_TE.gather(1, expert_TK.clamp(min=0))
            expert_TK = torch.where(refused_TK, DROPPED, expert_TK)
            break
        if not refused_TE.any():
            break
        scores_TE = scores_TE.masked_fill(refused_TE, -torch.inf)
    # beyond the last row lies what pads the micro-batch over cp
    return torch.where(tokens.valid_S[:, None], expert_TK[tokens.number_S.clamp(max=len(expert_TK) - 1)], DROPPED)


def _beyond(expert_TK: torch.Tensor, num_experts: int, tokens: Tokens, capacity: int) -> torch.Tensor:
    """bool [T, E]: the token chooses the expert, but `capacity` earlier tokens of its row do too."""
    chosen_TE = choice_mask(expert_TK, num_experts)
    queue = chosen_TE.unflatten(0, (tokens.rows, tokens.length)).cumsum(1).flatten(0, 1)
    return (chosen_TE > 0) & (queue > capacity)


def make_record(prob_SE: torch.Tensor, expert_SK: torch.Tensor, first_SK: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """What is reported of a layer's routing, as sums over this rank's tokens: float64 [4 + E].

    dropped, rerouted: choices, not tokens. The last E are the demand for each expert, the router's own choices, before
    a capacity drops or reroutes any: where it does, what is served would look balanced when the router is not.
    """
    with torch.no_grad():
        demand_SE, served_SE = (choice_mask(chosen, prob_SE.shape[1]) for chosen in (first_SK, expert_SK))
        num_tokens, served = tokens.valid_S.sum(), served_SE.sum()
        entropy = (torch.special.entr(prob_SE).sum(1) * tokens.valid_S).sum()
        rerouted = served - (demand_SE * served_SE).sum()
        sums = torch.stack((num_tokens, num_tokens * expert_SK.shape[1] - served, rerouted, entropy))
        return torch.cat((sums, demand_SE.sum(0))).to(torch.float64)


def update_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> None:
    """Raise the bias of experts with less demand than the mean by `rate`, lower that of the others; in place.

    Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1). counts_E: choices of the whole update, before any
    capacity.
    """
    bias_E += rate * (counts_E.mean() - counts_E).sign().to(bias_E.dtype)
