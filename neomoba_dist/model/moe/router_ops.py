"""Scores to choices, weights and balance of a whole layer as torch operators of few launches: the kernels of
router_kernels.py, for the routing without a capacity and without groups of experts.

Shape letters: S tokens, E experts, K experts per token, N rows of the balance.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.model.optional import is_available
from neomoba_dist.parallel.mesh import Mesh


def takes_kernels(logits_SE: Tensor) -> bool:
    """Whether these operators run on the tensor."""
    return logits_SE.is_cuda and logits_SE.dtype == torch.float32 and len(logits_SE) > 0 and is_available("triton")


def rows_in_order(logits_SE: Tensor, tokens: Tokens, config: ModelConfig, mesh: Mesh) -> int:
    """N where the tokens of each row of the balance stand next to each other and can be summed by kernels, else 0."""
    if not takes_kernels(logits_SE):
        return 0
    from neomoba_dist.model.moe import router_kernels

    if config.num_experts > router_kernels.MOST_EXPERTS:
        return 0
    rows = 1 if config.router_aux_loss_scope == "global" else tokens.rows
    if rows > 1 and (tokens.split is not None or mesh.sequence_parallel or len(logits_SE) != rows * tokens.length):
        return 0
    return rows if router_kernels.block_of(len(logits_SE), rows, config.num_experts) else 0


@torch.library.custom_op("neomoba::route_tokens", mutates_args=())
def route_tokens(
    logits_SE: Tensor, bias_E: Tensor, valid_S: Tensor, rows: int, top_k: int, sigmoid: bool, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts int64 and weights float32 [S, K]; sums [N, 2 E + 2] of probabilities, choices, z and tokens (see
    balance.py); the record float64 [4 + E] (router.RECORD)."""
    from neomoba_dist.model.moe.router_kernels import Scoring, route_rows

    return route_rows(logits_SE, bias_E, valid_S, rows, Scoring(top_k, sigmoid, norm, scale))


@route_tokens.register_fake
def _(
    logits_SE: Tensor, bias_E: Tensor, valid_S: Tensor, rows: int, top_k: int, sigmoid: bool, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts = logits_SE.shape
    return (
        logits_SE.new_empty((tokens, top_k), dtype=torch.int64),
        logits_SE.new_empty(tokens, top_k),
        logits_SE.new_empty(rows, 2 * num_experts + 2),
        logits_SE.new_empty(4 + num_experts, dtype=torch.float64),
    )


@torch.library.custom_op("neomoba::route_tokens_backward", mutates_args=())
def _route_tokens_backward(
    grad_weight: Tensor,
    grad_sums: Tensor | None,
    logits_SE: Tensor,
    valid_S: Tensor,
    expert_SK: Tensor,
    rows: int,
    sigmoid: bool,
    norm: bool,
    scale: float,
) -> Tensor:
    from neomoba_dist.model.moe.router_kernels import Scoring, route_rows_backward

    scoring = Scoring(expert_SK.shape[1], sigmoid, norm, scale)
    return route_rows_backward(grad_weight, grad_sums, logits_SE, valid_S, expert_SK, rows, scoring)


@_route_tokens_backward.register_fake
def _(
    grad_weight: Tensor,
    grad_sums: Tensor | None,
    logits_SE: Tensor,
    valid_S: Tensor,
    expert_SK: Tensor,
    rows: int,
    sigmoid: bool,
    norm: bool,
    scale: float,
) -> Tensor:
    return torch.empty_like(logits_SE)


def _keep_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_SE, _, valid_S, ctx.rows, _, *ctx.scoring = inputs
    ctx.save_for_backward(logits_SE, valid_S, output[0])
    ctx.set_materialize_grads(False)


def _differentiate_routing(
    ctx: Any, unused: None, grad_weight: Tensor | None, grad_sums: Tensor | None, not_either: None
) -> tuple[Tensor | None, ...]:
    logits_SE, valid_S, expert_SK = ctx.saved_tensors
    if grad_weight is None:
        grad_weight = logits_SE.new_zeros(expert_SK.shape)
    grad_logits = _route_tokens_backward(grad_weight, grad_sums, logits_SE, valid_S, expert_SK, ctx.rows, *ctx.scoring)
    return grad_logits, *(None,) * 7


route_tokens.register_autograd(_differentiate_routing, setup_context=_keep_routing)


@torch.library.custom_op("neomoba::balance_loss", mutates_args=())
def balance_loss(sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    """Mean over rows of balance_scale * sum(choices * probabilities) / tokens^2 + z_scale * z / tokens, []."""
    from neomoba_dist.model.moe.router_kernels import balance_loss_of

    return balance_loss_of(sums, balance_scale, z_scale)


@balance_loss.register_fake
def _(sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    return sums.new_empty(())


@torch.library.custom_op("neomoba::balance_loss_backward", mutates_args=())
def _balance_loss_backward(grad: Tensor, sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    from neomoba_dist.model.moe.router_kernels import balance_loss_backward

    return balance_loss_backward(grad, sums, balance_scale, z_scale)


@_balance_loss_backward.register_fake
def _(grad: Tensor, sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    return torch.empty_like(sums)


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sums, *ctx.scales = inputs
    ctx.save_for_backward(sums)


def _differentiate_balance(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (sums,) = ctx.saved_tensors
    return _balance_loss_backward(grad, sums, *ctx.scales), None, None


balance_loss.register_autograd(_differentiate_balance, setup_context=_keep_sums)
