"""MoBA attention of one KV head over one document on the CPU, forward and backward, from a HeadPlan.

Logits live in powers of two: queries are scaled by log2(e) / sqrt(D). While |q| |k| stays small, exp2 of the plain
logits can neither overflow nor vanish, so nothing is subtracted and pieces simply add up; otherwise the pieces are
merged with a running maximum (Milakov & Gimelshein, arXiv 1805.02867). The backward pass knows the final logsumexp, so
every piece recomputes its exact probabilities on its own (Dao et al., FlashAttention, arXiv 2205.14135, appendix B).

Legend: R rows (token, query head of the group; the last one is zero and pads lists), S keys, D head_dim, E = D + 1,
G query heads per KV head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.kernels.gather_plan import HeadPlan, Item, Rows, TileItem, Tiles
from neomoba_dist.model.kernels.gemm import linear

SAFE_EXPONENT = 60.0  # 2^60 times any number of keys is far from float32's 2^127, 2^-60 from its smallest number


class Head(NamedTuple):
    """Keys and values of one KV head of one document, contiguous, float32 or float64."""

    k_SD: Tensor
    v_SD: Tensor
    group: int
    position: int  # of the first query


class OnlineSoftmax:
    """Sums over keys that arrive in pieces: weighted values, their total weight, and the peak they are relative to."""

    def __init__(self, head: Head, q_RD: Tensor) -> None:
        self.values_RD = torch.zeros_like(q_RD)
        self.total_R = q_RD.new_zeros(len(q_RD))
        bound = q_RD.square().sum(-1).amax().sqrt() * head.k_SD.square().sum(-1).amax().sqrt()
        bounded = bool(bound <= SAFE_EXPONENT)  # False for not-a-number
        self.peak_R = None if bounded else q_RD.new_full((len(q_RD),), -torch.inf)

    def add(self, rows: Rows, logits: Tensor, v: Tensor) -> None:
        """Add keys with `logits` [..., m, keys] (overwritten) and values `v` [..., keys, D] to the rows [..., m]."""
        if self.peak_R is not None:
            self._raise_peak(rows, logits)
        weights = logits.exp2_()
        values = torch.bmm(weights, v) if weights.dim() == 3 else linear(weights, v.t())
        accumulate(self.total_R, rows, weights.sum(-1))
        accumulate(self.values_RD, rows, values)

    def _raise_peak(self, rows: Rows, logits: Tensor) -> None:
        assert self.peak_R is not None
        old = take(self.peak_R, rows)
        new = torch.maximum(old, logits.amax(-1))
        shrink = (old - new.masked_fill(new == -torch.inf, 0.0)).exp2()
        put(self.peak_R, rows, new)
        put(self.total_R, rows, take(self.total_R, rows) * shrink)
        put(self.values_RD, rows, take(self.values_RD, rows) * shrink[..., None])
        logits.sub_(new.masked_fill(new == -torch.inf, 0.0)[..., None])

    def result(self) -> tuple[Tensor, Tensor]:
        """Attention output [R, D] and natural logsumexp [R]; 0 and -inf for rows without keys."""
        self.values_RD /= self.total_R.masked_fill(self.total_R == 0, 1.0)[:, None]
        lse = self.total_R.log2() if self.peak_R is None else self.total_R.log2() + self.peak_R
        return self.values_RD, lse * math.log(2)


def forward_head(head: Head, plan: HeadPlan, q_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Output [R, D] and logsumexp [R] of one head; the last row means nothing.

    Args:
        q_RD: queries times log2(e) / sqrt(D); the last row is zero.
    """
    state = OnlineSoftmax(head, q_RD)
    for tiles in plan.tiles:
        logits = torch.bmm(tiles.rows.view(q_RD), tiles.keys.view(head.k_SD).transpose(1, 2))
        if tiles.masked:
            logits.masked_fill_(later_keys(tiles, head.group), -torch.inf)
        state.add(tiles.rows, logits, tiles.keys.view(head.v_SD))
    for item in plan.items:
        keys = slice(item.key_start, item.key_stop)
        logits = linear(take(q_RD, item.rows), head.k_SD[keys])
        if item.masked:
            logits.masked_fill_(future(item, head), -torch.inf)
        state.add(item.rows, logits, head.v_SD[keys])
    return state.result()


def backward_head(head: Head, plan: HeadPlan, q_RE: Tensor, grad_RE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [R, D], dk [S, D], dv [S, D] of one head. One more column makes the products yield "logits - lse"
    and "grad . v - delta" at no extra cost.

    Args:
        q_RE: queries times log2(e) / sqrt(D), and -log2(e) times the logsumexp of each row over all its keys.
        grad_RE: gradient of the output, and minus delta, where delta is the sum over D of out * grad_out, minus the
            gradient of the logsumexp. The last row of both is zero.
    """
    dim = head.k_SD.shape[1]
    k_SE, v_SE = (torch.cat([x, x.new_ones(len(x), 1)], dim=1) for x in (head.k_SD, head.v_SD))
    dq_RD = q_RE.new_zeros(len(q_RE), dim)
    dk_DS, dv_DS = (x.new_zeros(dim, len(x)) for x in (head.k_SD, head.v_SD))
    for tiles in plan.tiles:
        q, grad = tiles.rows.view(q_RE), tiles.rows.view(grad_RE)
        weights = torch.bmm(q, tiles.keys.view(k_SE).transpose(1, 2))
        if tiles.masked:
            weights.masked_fill_(later_keys(tiles, head.group), -torch.inf)
        weights.exp2_()
        slope = torch.bmm(grad, tiles.keys.view(v_SE).transpose(1, 2)).mul_(weights)
        for sums_DS, factor, rows in ((dv_DS, weights, grad), (dk_DS, slope, q)):
            sums = torch.bmm(rows[..., :dim].transpose(1, 2), factor)  # [tiles, D, keys]
            tiles.keys.view(sums_DS.t()).add_(sums.transpose(1, 2))
        tiles.rows.view(dq_RD).add_(torch.bmm(slope, tiles.keys.view(head.k_SD)))
    for item in plan.items:
        keys = slice(item.key_start, item.key_stop)
        q_ME, grad_ME = take(q_RE, item.rows), take(grad_RE, item.rows)
        weights = linear(q_ME, k_SE[keys])
        if item.masked:
            weights.masked_fill_(future(item, head), -torch.inf)
        weights.exp2_()
        dv_DS[:, keys].add_(linear(grad_ME[:, :dim].t(), weights.t()))
        slope = linear(grad_ME, v_SE[keys]).mul_(weights)
        dk_DS[:, keys].add_(linear(q_ME[:, :dim].t(), slope.t()))
        accumulate(dq_RD, item.rows, linear(slope, head.k_SD[keys].t()))
    return dq_RD.mul_(dim**-0.5), dk_DS.t().mul(math.log(2)), dv_DS.t()


def later_keys(tiles: TileItem, group: int) -> Tensor:
    """bool [tile * G, tile]: the keys of a diagonal tile after each row's token."""
    edge = tiles.keys.height
    return torch.ones(edge, edge, dtype=torch.bool).triu_(1).repeat_interleave(group, dim=0)


def future(item: Item, head: Head) -> Tensor:
    """bool [m, keys]: keys after the row's own position."""
    keys = torch.arange(item.key_start, item.key_stop)
    rows = item.rows if isinstance(item.rows, Tensor) else torch.arange(item.rows.start, item.rows.stop)
    return keys > (rows // head.group + head.position)[:, None]


def take(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x; a view of it for slices and tiles."""
    if isinstance(rows, Tensor):
        return x.index_select(0, rows)
    return rows.view(x) if isinstance(rows, Tiles) else x[rows]


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Overwrite rows of x."""
    if isinstance(rows, Tensor):
        x.index_copy_(0, rows, values)
    else:
        take(x, rows).copy_(values)


def accumulate(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Add to rows of x."""
    if isinstance(rows, Tensor):
        x.index_add_(0, rows, values)
    else:
        take(x, rows).add_(values)
