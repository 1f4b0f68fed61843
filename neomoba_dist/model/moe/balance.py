"""Auxiliary losses of a router: load balance and z-loss, the same for every layout.

Load balance (Switch, arXiv 2101.03961, equation 4): E * sum over experts of f * P, with P the expert's mean probability
and f the share of the choices that fall on it; 1 where both are uniform. As in DeepSeek-V3 (arXiv 2412.19437, equations
17 to 20) a choice is here one of the K best scores, before the bias and the limit to groups: the loss evens out what
the router itself prefers. Over the tokens of each row, then averaged over rows (DeepSeek-V3), or over all tokens of a
micro-batch of all data-parallel ranks ("global", arXiv 2501.11873). z-loss (ST-MoE, arXiv 2202.08906, equation 5): mean
of logsumexp(logits)^2.

Shape letters: S tokens of this rank, E experts, N rows (1 in the global variant).
"""

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.moe.fp32_linear import exact_linear
from neomoba_dist.model.moe.router_ops import balance_loss, takes_kernels
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.parallel.expert import sum_over
from neomoba_dist.parallel.expert_rows import choice_mask, top_experts
from neomoba_dist.parallel.mesh import Mesh


def sums_of_rows(logits_SE: torch.Tensor, prob_SE: torch.Tensor, tokens: Tokens, config: ModelConfig) -> torch.Tensor:
    """Sums over this rank's tokens of each row, [N, 2 E + 2]: probabilities, choices, z, number of tokens.

    prob_SE: the scores, brought to a sum of 1.
    """
    # the logits order the experts as the scores do, which may round to the same value
    preferred_SK = top_experts(logits_SE.detach(), config.num_experts_per_tok, tokens.valid_S)
    choices_SE = choice_mask(preferred_SK, config.num_experts)
    z_S = logits_SE.logsumexp(1).square()
    per_token = torch.cat((prob_SE, choices_SE.to(prob_SE.dtype), z_S[:, None]), dim=1)
    is_of_row = tokens.row_S == torch.arange(tokens.rows, device=z_S.device)[:, None]
    member_NS = (is_of_row & tokens.valid_S).to(prob_SE.dtype)
    return torch.cat((exact_linear(member_NS, per_token.t()), member_NS.sum(1, keepdim=True)), dim=1)


def auxiliary_loss(sums: torch.Tensor, config: ModelConfig, mesh: Mesh) -> torch.Tensor:
    """Both losses with their coefficients, []. sums: see `sums_of_rows`.

    Every rank that shares the rows returns the same value, whose gradient reaches its own tokens. Over cp and dp
    gradients are averaged later; `sum_over` makes up for it.
    """
    num_experts, top_k = config.num_experts, config.num_experts_per_tok
    if mesh.sequence_parallel:
        sums = sum_over(sums, mesh, "tp", averaged=False)
    if config.router_aux_loss_scope == "global":
        sums = sum_over(sums.sum(0, keepdim=True) if len(sums) > 1 else sums, mesh, "dp_cp", averaged=True)
    else:
        sums = sum_over(sums, mesh, "cp", averaged=True)
    if takes_kernels(sums):
        return balance_loss(sums, config.router_aux_loss_coef * num_experts / top_k, config.router_z_loss_coef)
    probability, choices, z, count = sums.split((num_experts, num_experts, 1, 1), dim=1)
    count = count.clamp(min=1)
    balance_N = num_experts * (choices.detach() * probability).sum(1) / (count[:, 0] ** 2 * top_k)
    z_N = z[:, 0] / count[:, 0]
    return (config.router_aux_loss_coef * balance_N + config.router_z_loss_coef * z_N).mean()
