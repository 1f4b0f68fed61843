# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels of a router: from logits to experts, weights, the sums of the balance losses and the record, and back.

One pass over the tokens each way, everything in float32; sums go by blocks of tokens and then over blocks in a fixed
order. Of the same scores the lower expert is taken.

Legend: S tokens, E experts, EP experts padded to a power of two, K choices per token, N rows of the balance, BM tokens
and BB blocks per tile. Per block `partial` [blocks, 4, EP] holds probabilities, choices by score alone, demand, and
(z, tokens, entropy, choices that were served).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

kernel = triton.jit(do_not_specialize=("tokens", "tokens_per_row", "blocks", "blocks_per_row", "rows"))

MOST_EXPERTS = 512


class Scoring(NamedTuple):
    """What of the configuration the kernels need; see router.py."""

    top_k: int
    sigmoid: bool
    norm: bool
    scale: float


@triton.jit
def softmax_rows(logit):
    """(softmax, logsumexp) over axis 1."""
    top = tl.max(logit, 1)
    power = tl.exp(logit - top[:, None])
    total = tl.sum(power, 1)
    return power / total[:, None], top + tl.log(total)


@kernel
def route_kernel(
    logits, bias, valid, expert, weight, partial, tokens, EXPERTS: tl.constexpr, EP: tl.constexpr,
    CHOICES: tl.constexpr, KP: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """expert, weight [S, K] and the block's part of all sums."""
    t, e, k_of = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EP), tl.arange(0, KP)
    known = (e < EXPERTS)[None, :]
    cell = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    logit = tl.load(logits + cell, mask=(t < tokens)[:, None] & known, other=0)
    logit = tl.where(known, logit, -float("inf"))
    present = tl.load(valid + t, mask=t < tokens, other=0) != 0
    prob, lse = softmax_rows(logit)
    scores = prob
    if SIGMOID:
        scores = tl.where(known, tl.sigmoid(logit), 0)
        prob = scores / tl.sum(scores, 1)[:, None]
    open_to = tl.where(known, scores + tl.load(bias + e, mask=e < EXPERTS, other=0)[None, :], -float("inf"))
    open_to = tl.where(open_to == open_to, open_to, -float("inf"))
    by_score = tl.where(logit == logit, logit, -float("inf"))
    chosen = tl.full([BM, KP], -1, tl.int64)
    score_of = tl.zeros([BM, KP], tl.float32)
    demand, choices = tl.zeros([BM, EP], tl.float32), tl.zeros([BM, EP], tl.float32)
    for k in tl.static_range(CHOICES):
        best, winner = tl.max(open_to, 1, return_indices=True)
        here, found = e[None, :] == winner[:, None], (best > -float("inf")) & present
        open_to = tl.where(here, -float("inf"), open_to)
        demand += tl.where(here & found[:, None], 1.0, 0.0)
        value = tl.sum(tl.where(here & found[:, None], scores, 0), 1)
        chosen = tl.where((k_of == k)[None, :] & found[:, None], winner[:, None].to(tl.int64), chosen)
        score_of = tl.where((k_of == k)[None, :], value[:, None], score_of)
        best, winner = tl.max(by_score, 1, return_indices=True)
        here = e[None, :] == winner[:, None]
        by_score = tl.where(here, -float("inf"), by_score)
        choices += tl.where(here & ((best > -float("inf")) & present)[:, None], 1.0, 0.0)
    if NORM:
        score_of = score_of / (tl.sum(score_of, 1) + 1.1754943508222875e-38)[:, None]
    cell = t.to(tl.int64)[:, None] * CHOICES + k_of[None, :]
    stored = (t < tokens)[:, None] & (k_of < CHOICES)[None, :]
    tl.store(expert + cell, chosen, mask=stored)
    tl.store(weight + cell, score_of * SCALE, mask=stored)
    entropy = tl.sum(tl.where(prob > 0, -prob * tl.log(prob), tl.where(prob == 0, 0, prob)), 1)
    out = partial + tl.program_id(0) * 4 * EP + e
    tl.store(out, tl.sum(tl.where(present[:, None], prob, 0), 0))
    tl.store(out + EP, tl.sum(choices, 0))
    demand_e = tl.sum(demand, 0)
    tl.store(out + 2 * EP, demand_e)
    z = tl.sum(tl.where(present, lse * lse, 0), 0)
    count = tl.sum(tl.where(present, 1.0, 0.0), 0)
    entropy = tl.sum(tl.where(present, entropy, 0), 0)
    scalars = tl.where(e == 0, z, tl.where(e == 1, count, tl.where(e == 2, entropy, tl.sum(demand_e, 0))))
    tl.store(out + 3 * EP, scalars)


@kernel
def finish_kernel(
    partial, sums, record, blocks, blocks_per_row, EXPERTS: tl.constexpr, EP: tl.constexpr, CHOICES: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """One program per row: sums [N, 2 E + 2], of probabilities, choices, z and tokens. The last one: the record."""
    row, rows = tl.program_id(0), tl.num_programs(0) - 1
    e = tl.arange(0, EP)
    first = tl.where(row < rows, row * blocks_per_row, 0)
    last = tl.where(row < rows, first + blocks_per_row, blocks)
    prob, choices = tl.zeros([EP], tl.float32), tl.zeros([EP], tl.float32)
    demand, scalars = tl.zeros([EP], tl.float32), tl.zeros([EP], tl.float32)
    for start in range(first, last, BB):
        block = start + tl.arange(0, BB)
        cell = partial + block[:, None] * 4 * EP + e[None, :]
        there = (block < last)[:, None] & (e < EP)[None, :]
        scalars += tl.sum(tl.load(cell + 3 * EP, mask=there, other=0), 0)
        if row < rows:
            prob += tl.sum(tl.load(cell, mask=there, other=0), 0)
            choices += tl.sum(tl.load(cell + EP, mask=there, other=0), 0)
        else:
            demand += tl.sum(tl.load(cell + 2 * EP, mask=there, other=0), 0)
    z, count = tl.sum(tl.where(e == 0, scalars, 0), 0), tl.sum(tl.where(e == 1, scalars, 0), 0)
    if row < rows:
        out = sums + row * (2 * EXPERTS + 2)
        tl.store(out + e, prob, mask=e < EXPERTS)
        tl.store(out + EXPERTS + e, choices, mask=e < EXPERTS)
        tl.store(out + 2 * EXPERTS, z)
        tl.store(out + 2 * EXPERTS + 1, count)
    else:
        entropy, served = tl.sum(tl.where(e == 2, scalars, 0), 0), tl.sum(tl.where(e == 3, scalars, 0), 0)
        head = tl.where(e == 0, count, tl.where(e == 1, count * CHOICES - served, tl.where(e == 3, entropy, 0)))
        tl.store(record + e, head.to(tl.float64), mask=e < 4)
        tl.store(record + 4 + e, demand.to(tl.float64), mask=e < EXPERTS)


@kernel
def route_backward_kernel(
    logits, valid, expert, grad_weight, grad_sums, out, tokens, tokens_per_row, EXPERTS: tl.constexpr,
    EP: tl.constexpr, CHOICES: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits from those of the weights and of the rows' sums."""
    t, e = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EP)
    known = (e < EXPERTS)[None, :]
    cell = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    logit = tl.load(logits + cell, mask=(t < tokens)[:, None] & known, other=0)
    logit = tl.where(known, logit, -float("inf"))
    present = tl.load(valid + t, mask=t < tokens, other=0) != 0
    softmax, lse = softmax_rows(logit)
    scores = softmax
    if SIGMOID:
        scores = tl.where(known, tl.sigmoid(logit), 0)
    total, inner = tl.zeros([BM], tl.float32) + 1.1754943508222875e-38, tl.zeros([BM], tl.float32)
    grad_score = tl.zeros([BM, EP], tl.float32)
    is_chosen = tl.zeros([BM, EP], tl.float32)
    for k in tl.static_range(CHOICES):
        chosen = tl.load(expert + t.to(tl.int64) * CHOICES + k, mask=t < tokens, other=-1).to(tl.int32)
        grad = SCALE * tl.load(grad_weight + t.to(tl.int64) * CHOICES + k, mask=(t < tokens) & (chosen >= 0), other=0)
        here = e[None, :] == chosen[:, None]
        value = tl.sum(tl.where(here, scores, 0), 1)
        total += value
        inner += grad * value
        grad_score += tl.where(here, grad[:, None], 0)
        is_chosen += tl.where(here, 1.0, 0.0)
    if NORM:
        grad_score = grad_score / total[:, None] - is_chosen * (inner / total / total)[:, None]
    grad_logit = tl.zeros([BM, EP], tl.float32)
    if grad_sums is not None:
        row = grad_sums + (tl.program_id(0) * BM // tokens_per_row) * (2 * EXPERTS + 2)
        grad_prob = tl.load(row + e, mask=e < EXPERTS, other=0)[None, :] + tl.zeros([BM, EP], tl.float32)
        grad_logit = tl.load(row + 2 * EXPERTS) * 2 * lse[:, None] * softmax
        if SIGMOID:
            mass = tl.sum(scores, 1)
            grad_prob = (grad_prob - (tl.sum(grad_prob * scores, 1) / mass)[:, None]) / mass[:, None]
        grad_score += grad_prob
    if SIGMOID:
        grad_logit += grad_score * scores * (1 - scores)
    else:
        grad_logit += scores * (grad_score - tl.sum(scores * grad_score, 1)[:, None])
    grad_logit = tl.where(present[:, None], grad_logit, 0)
    tl.store(out + cell, grad_logit, mask=(t < tokens)[:, None] & known)


@kernel
def balance_kernel(
    sums, loss, rows, balance_scale, z_scale, EXPERTS: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    """Mean over rows of balance_scale * sum(choices * probabilities) / tokens^2 + z_scale * z / tokens."""
    e = tl.arange(0, EP)
    total = 0.0
    for row in range(rows):
        row_sums = sums + row * (2 * EXPERTS + 2)
        prob = tl.load(row_sums + e, mask=e < EXPERTS, other=0)
        choices = tl.load(row_sums + EXPERTS + e, mask=e < EXPERTS, other=0)
        count = tl.maximum(tl.load(row_sums + 2 * EXPERTS + 1), 1.0)
        total += balance_scale * tl.sum(choices * prob, 0) / (count * count)
        total += z_scale * tl.load(row_sums + 2 * EXPERTS) / count
    tl.store(loss, total / rows)


@kernel
def balance_backward_kernel(
    sums, grad, out, rows, balance_scale, z_scale, EXPERTS: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    """The gradient of the sums, zero for choices and tokens. One program per row."""
    e, row = tl.arange(0, EP), tl.program_id(0)
    row_sums, result = sums + row * (2 * EXPERTS + 2), out + row * (2 * EXPERTS + 2)
    factor = tl.load(grad) / rows
    choices = tl.load(row_sums + EXPERTS + e, mask=e < EXPERTS, other=0)
    count = tl.maximum(tl.load(row_sums + 2 * EXPERTS + 1), 1.0)
    tl.store(result + e, factor * balance_scale * choices / (count * count), mask=e < EXPERTS)
    tl.store(result + EXPERTS + e, tl.zeros([EP], tl.float32), mask=e < EXPERTS)
    tl.store(result + 2 * EXPERTS, factor * z_scale / count)
    tl.store(result + 2 * EXPERTS + 1, 0.0)


@kernel
def split_kernel(x, out, tokens, EXPERTS: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """x [S, E] float32 as a sum of three bfloat16 parts, out [S, 3 E]: 24 bits, all that x has."""
    t, e = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EP)
    inside = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    rest = tl.load(x + t.to(tl.int64)[:, None] * EXPERTS + e[None, :], mask=inside, other=0)
    cell = out + t.to(tl.int64)[:, None] * 3 * EXPERTS + e[None, :]
    for part in tl.static_range(3):
        rounded = rest.to(tl.bfloat16)
        tl.store(cell + part * EXPERTS, rounded, mask=inside)
        rest -= rounded.to(tl.float32)


def block_of(tokens: int, rows: int, num_experts: int) -> int:
    """BM, which divides a row; 0: too small to be worth it."""
    block = min(64, max(8, 2048 // triton.next_power_of_2(num_experts)))
    while rows > 1 and tokens // rows % block:
        block //= 2
    return block if block >= 8 else 0


def experts_padded(num_experts: int) -> int:
    """EP."""
    return max(16, triton.next_power_of_2(num_experts))


def route_rows(
    logits_SE: Tensor, bias_E: Tensor, valid_S: Tensor, rows: int, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """expert int64, weight float32 [S, K], sums float32 [N, 2 E + 2] and record float64 [4 + E]."""
    tokens, num_experts = logits_SE.shape
    block, padded = block_of(tokens, rows, num_experts), experts_padded(num_experts)
    blocks = triton.cdiv(tokens, block)
    new = logits_SE.new_empty
    partial, sums = new(blocks, 4, padded), new(rows, 2 * num_experts + 2)
    expert_SK, weight_SK = new((tokens, scoring.top_k), dtype=torch.int64), new(tokens, scoring.top_k)
    record = new(4 + num_experts, dtype=torch.float64)
    route_kernel[(blocks,)](
        logits_SE, bias_E, valid_S.view(torch.uint8), expert_SK, weight_SK, partial, tokens, EXPERTS=num_experts,
        EP=padded, CHOICES=scoring.top_k, KP=triton.next_power_of_2(scoring.top_k), SIGMOID=scoring.sigmoid,
        NORM=scoring.norm, SCALE=scoring.scale, BM=block,
    )  # fmt: skip
    finish_kernel[(rows + 1,)](
        partial, sums, record, blocks, blocks // rows, EXPERTS=num_experts, EP=padded, CHOICES=scoring.top_k,
        BB=max(1, min(64, 2048 // padded)),
    )  # fmt: skip
    return expert_SK, weight_SK, sums, record


def route_rows_backward(
    grad_weight: Tensor, grad_sums: Tensor | None, logits_SE: Tensor, valid_S: Tensor, expert_SK: Tensor, rows: int,
    scoring: Scoring,
) -> Tensor:  # fmt: skip
    """The gradient of the logits [S, E]. grad_sums: None, where no loss depends on the sums."""
    tokens, num_experts = logits_SE.shape
    out, block = torch.empty_like(logits_SE), block_of(tokens, rows, num_experts)
    route_backward_kernel[(triton.cdiv(tokens, block),)](
        logits_SE, valid_S.view(torch.uint8), expert_SK, grad_weight.contiguous(), grad_sums, out, tokens,
        tokens // rows, EXPERTS=num_experts, EP=experts_padded(num_experts), CHOICES=scoring.top_k,
        SIGMOID=scoring.sigmoid, NORM=scoring.norm, SCALE=scoring.scale, BM=block,
    )  # fmt: skip
    return out


def balance_loss_of(sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    """The loss, []."""
    num_experts, loss = sums.shape[1] // 2 - 1, sums.new_empty(())
    balance_kernel[(1,)](
        sums, loss, len(sums), balance_scale, z_scale, EXPERTS=num_experts, EP=experts_padded(num_experts)
    )  # fmt: skip
    return loss


def balance_loss_backward(grad: Tensor, sums: Tensor, balance_scale: float, z_scale: float) -> Tensor:
    """The gradient of the sums [N, 2 E + 2]."""
    num_experts, out = sums.shape[1] // 2 - 1, torch.empty_like(sums)
    balance_backward_kernel[(len(sums),)](
        sums, grad, out, len(sums), balance_scale, z_scale, EXPERTS=num_experts, EP=experts_padded(num_experts)
    )  # fmt: skip
    return out


def split_in_three(x_SE: Tensor) -> Tensor:
    """float32 [S, E] -> bfloat16 [S, 3 E] of the same sum."""
    tokens, num_experts = x_SE.shape
    out = x_SE.new_empty((tokens, 3 * num_experts), dtype=torch.bfloat16)
    padded = experts_padded(num_experts)
    block = max(1, 2048 // padded)
    split_kernel[(triton.cdiv(tokens, block),)](
        x_SE.contiguous(), out, tokens, EXPERTS=num_experts, EP=padded, BM=block
    )
    return out
