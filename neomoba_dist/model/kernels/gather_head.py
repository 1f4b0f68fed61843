"""MoBA attention of one KV head over one document on the CPU, forward and backward, from a HeadPlan.

Logits live in powers of two: queries are scaled by log2(e) / sqrt(D). While |q| |k| stays small, exp2 of the plain
logits can neither overflow nor vanish, so nothing is subtracted and pieces simply add up; otherwise the pieces are
merged with a running maximum (Milakov & Gimelshein, arXiv 1805.02867). The backward pass knows the final logsumexp, so
every piece recomputes its exact probabilities on its own (Dao et al., FlashAttention, arXiv 2205.14135, appendix B).

Legend: R rows (token, query head of the group; the last one is zero and pads lists), S keys, D head_dim, n tiles of the
diagonal, G query heads per KV head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.kernels.gather_plan import HeadPlan, Item, Rows
from neomoba_dist.model.kernels.gemm import linear

SAFE_EXPONENT = 60.0  # 2^60 times any number of keys is far from float32's 2^127, 2^-60 from its smallest number


class Head(NamedTuple):
    """One KV head of one document: all contiguous, float32 or float64; the last row of q is zero."""

    q_RD: Tensor  # already scaled by log2(e) / sqrt(D)
    k_SD: Tensor
    v_SD: Tensor
    group: int
    position: int  # of the first query


class OnlineSoftmax:
    """Sums over keys that arrive in pieces: weighted values, their total weight, and the peak they are relative to."""

    def __init__(self, head: Head) -> None:
        rows = head.q_RD.shape[0]
        self.values_RD = torch.zeros_like(head.q_RD)
        self.total_R = head.q_RD.new_zeros(rows)
        bound = head.q_RD.square().sum(-1).amax().sqrt() * head.k_SD.square().sum(-1).amax().sqrt()
        bounded = bool(bound <= SAFE_EXPONENT)  # False for not-a-number
        self.peak_R = None if bounded else head.q_RD.new_full((rows,), -torch.inf)

    def add(self, rows: Rows, logits: Tensor, v: Tensor) -> None:
        """Add keys with `logits` [..., m, keys] (overwritten) and values `v` [..., keys, D] to the rows [..., m]."""
        if self.peak_R is not None:
            self._raise_peak(rows, logits)
        weights = logits.exp2_()
        values = torch.bmm(weights, v) if weights.dim() == 3 else linear(weights, v.t())
        accumulate(self.total_R, rows, weights.sum(-1).flatten())
        accumulate(self.values_RD, rows, values.flatten(0, -2))

    def _raise_peak(self, rows: Rows, logits: Tensor) -> None:
        assert self.peak_R is not None
        old = take(self.peak_R, rows)
        new = torch.maximum(old, logits.amax(-1).flatten())
        put(self.peak_R, rows, new)
        new = new.masked_fill(new == -torch.inf, 0.0)
        shrink = (old - new).exp2()
        put(self.total_R, rows, take(self.total_R, rows) * shrink)
        put(self.values_RD, rows, take(self.values_RD, rows) * shrink[:, None])
        logits.sub_(new.view(logits.shape[:-1])[..., None])

    def result(self) -> tuple[Tensor, Tensor]:
        """Attention output [R, D] and natural logsumexp [R]; 0 and -inf for rows without keys."""
        self.values_RD /= self.total_R.masked_fill(self.total_R == 0, 1.0)[:, None]
        lse = self.total_R.log2() if self.peak_R is None else self.total_R.log2() + self.peak_R
        return self.values_RD, lse * math.log(2)


def forward_head(head: Head, plan: HeadPlan) -> tuple[Tensor, Tensor]:
    """Output [R, D] and logsumexp [R] of one head; the last row means nothing."""
    state = OnlineSoftmax(head)
    if plan.diagonal_tiles:
        later = later_keys(plan.tile, head)
        for rows, keys in diagonal_batches(head, plan):
            count = (keys.stop - keys.start) // plan.tile
            q, k, v = tiles(head.q_RD, rows, count), tiles(head.k_SD, keys, count), tiles(head.v_SD, keys, count)
            state.add(rows, torch.bmm(q, k.transpose(1, 2)).masked_fill_(later, -torch.inf), v)
    for item in plan.items:
        keys = slice(item.key_start, item.key_stop)
        logits = linear(take(head.q_RD, item.rows), head.k_SD[keys])
        if item.masked:
            logits.masked_fill_(future(item, head), -torch.inf)
        state.add(item.rows, logits, head.v_SD[keys])
    return state.result()


def backward_head(head: Head, plan: HeadPlan, lse_R: Tensor, delta_R: Tensor, grad_RD: Tensor) -> tuple[Tensor, ...]:
    """Gradients dq [R, D], dk [S, D], dv [S, D] of one head. The last row of all arguments is zero.

    Args:
        lse_R: natural logsumexp of each row over all its keys.
        delta_R: sum over D of out * grad_out, minus the gradient of the logsumexp.
        grad_RD: gradient of the output.
    """
    dim = head.q_RD.shape[1]
    # One more column makes the products yield "logits - lse" and "grad . v - delta" at no extra cost.
    q = torch.cat([head.q_RD, lse_R[:, None] * -math.log2(math.e)], dim=1)
    grad = torch.cat([grad_RD, -delta_R[:, None]], dim=1)
    k, v = (torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1) for x in (head.k_SD, head.v_SD))
    dq = torch.zeros_like(head.q_RD)
    dk_DS, dv_DS = (torch.zeros_like(x.t(), memory_format=torch.contiguous_format) for x in (head.k_SD, head.v_SD))
    if plan.diagonal_tiles:
        later = later_keys(plan.tile, head)
        for rows, keys in diagonal_batches(head, plan):
            count = (keys.stop - keys.start) // plan.tile
            q_n, grad_n, k_n, v_n = (
                tiles(x, part, count) for x, part in ((q, rows), (grad, rows), (k, keys), (v, keys))
            )
            weights = torch.bmm(q_n, k_n.transpose(1, 2)).masked_fill_(later, -torch.inf).exp2_()
            dv_DS[:, keys] += torch.bmm(weights.transpose(1, 2), grad_n[..., :dim]).flatten(0, 1).t()
            slope = torch.bmm(grad_n, v_n.transpose(1, 2)).mul_(weights)
            dk_DS[:, keys] += torch.bmm(slope.transpose(1, 2), q_n[..., :dim]).flatten(0, 1).t()
            dq[rows] += torch.bmm(slope, k_n[..., :dim]).flatten(0, 1)
    for item in plan.items:
        keys = slice(item.key_start, item.key_stop)
        q_m, grad_m = take(q, item.rows), take(grad, item.rows)
        weights = linear(q_m, k[keys])
        if item.masked:
            weights.masked_fill_(future(item, head), -torch.inf)
        weights.exp2_()
        dv_DS[:, keys] += linear(grad_m[:, :dim].t(), weights.t())
        slope = linear(grad_m, v[keys]).mul_(weights)
        dk_DS[:, keys] += linear(q_m[:, :dim].t(), slope.t())
        accumulate(dq, item.rows, linear(slope, head.k_SD[keys].t()))
    return dq.mul_(dim**-0.5), dk_DS.t().mul(math.log(2)), dv_DS.t()


def later_keys(tile: int, head: Head) -> Tensor:
    """bool [tile * G, tile]: the keys of a diagonal tile after each row's token."""
    return torch.ones(tile, tile, dtype=torch.bool).triu_(1).repeat_interleave(head.group, dim=0)


def diagonal_batches(head: Head, plan: HeadPlan) -> list[tuple[slice, slice]]:
    """(rows, keys) of batches of diagonal tiles whose logits fit into the cache."""
    edge = plan.tile
    batch = max(1, (1 << 18) // (edge * edge * head.group))
    spans = []
    for first in range(0, plan.diagonal_tiles, batch):
        start = plan.diagonal_start + first * edge
        stop = plan.diagonal_start + min(first + batch, plan.diagonal_tiles) * edge
        rows = slice(start * head.group, stop * head.group)
        spans.append((rows, slice(start + head.position, stop + head.position)))
    return spans


def tiles(x: Tensor, part: slice, count: int) -> Tensor:
    """Rows or keys `part` of x as a batch [count, tile (times G), D] without a copy."""
    return x[part].unflatten(0, (count, -1))


def future(item: Item, head: Head) -> Tensor:
    """bool [m, keys]: keys after the row's own position."""
    keys = torch.arange(item.key_start, item.key_stop)
    rows = item.rows if isinstance(item.rows, Tensor) else torch.arange(item.rows.start, item.rows.stop)
    return keys > (rows // head.group + head.position)[:, None]


def take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)


def accumulate(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] += values
    else:
        x.index_add_(0, rows, values)
