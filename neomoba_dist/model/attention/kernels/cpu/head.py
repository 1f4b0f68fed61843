"""MoBA attention of one KV head over one document on the CPU, forward and backward, from a WorkList.

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
from torch.linalg import vector_norm

from neomoba_dist.model.attention.kernels.cpu.plan import Item, RowSelection, RowTiles, TileItem, WorkList
from neomoba_dist.model.attention.kernels.select import isolate_damaged, score_dtype
from neomoba_dist.parallel.gemm import product

SAFE_EXPONENT = 60.0  # 2^60 times any number of keys is far from float32's 2^127, 2^-60 from its smallest number


class KeyValueHead(NamedTuple):
    """Keys and values of one KV head of one document, as `prepare` makes them.

    The values have one more column of ones, so that one product gives weighted values and the total weight, or in the
    backward pass "grad . v - delta".
    """

    k_SD: Tensor
    v_SE: Tensor
    group: int
    position: int  # of the first query

    def part(self, item: Item) -> tuple[Tensor, Tensor]:
        """Keys and values of an item."""
        return self.k_SD[item.key_start : item.key_stop], self.v_SE[item.key_start : item.key_stop]

    def is_bounded(self, q_RD: Tensor) -> bool:
        """Whether no logit can be too large for exp2, by the lengths of the longest query and key."""
        bound = vector_norm(q_RD, dim=-1).amax() * vector_norm(self.k_SD, dim=-1).amax()
        return bool(bound <= SAFE_EXPONENT)  # False for not-a-number


def prepare(k_SD: Tensor, v_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous copies [S, D] and [S, E] of keys and values in the dtype of the scores."""
    k_SD, v_SD = (x.to(score_dtype(x.dtype)) for x in (k_SD, v_SD))
    if not is_finite(v_SD):
        k_SD, v_SD = isolate_damaged(k_SD, v_SD)
    return k_SD.contiguous(), append_ones(v_SD)


def is_finite(x: Tensor) -> bool:
    """Whether all elements are finite: at the cost of a sum, which also may refuse values near the largest number."""
    return bool(x.sum(dtype=score_dtype(x.dtype)).isfinite())


def append_ones(x: Tensor) -> Tensor:
    """[S, D] -> [S, D + 1]."""
    return torch.nn.functional.pad(x, (0, 1), value=1.0)


class OnlineSoftmax:
    """Sums over keys that arrive in pieces: weighted values, their total weight, and the peak they are relative to."""

    def __init__(self, q_RD: Tensor, bounded: bool) -> None:
        self.sums_RE = q_RD.new_zeros(len(q_RD), q_RD.shape[1] + 1)
        self.peak_R = None if bounded else q_RD.new_full((len(q_RD),), -torch.inf)

    def add(self, rows: RowSelection, logits: Tensor, v: Tensor) -> None:
        """Add keys with `logits` [..., m, keys] (overwritten) and values `v` [..., keys, E] to the rows [..., m]."""
        if self.peak_R is not None:
            self._raise_peak(rows, logits)
        weights = logits.exp2_()
        add_to_rows(self.sums_RE, rows, torch.bmm(weights, v) if weights.dim() == 3 else product(weights, v.t()))

    def _raise_peak(self, rows: RowSelection, logits: Tensor) -> None:
        assert self.peak_R is not None
        old = rows_of(self.peak_R, rows)
        new = torch.maximum(old, logits.amax(-1))
        base = new.masked_fill(new == -torch.inf, 0.0)
        set_rows(self.sums_RE, rows, rows_of(self.sums_RE, rows) * (old - base).exp2()[..., None])
        set_rows(self.peak_R, rows, new)
        logits.sub_(base[..., None])

    def result(self) -> tuple[Tensor, Tensor]:
        """Attention output [R, D] and natural logsumexp [R]; 0 and -inf for rows without keys."""
        values_RD, total_R = self.sums_RE[:, :-1], self.sums_RE[:, -1]
        lse = total_R.log2() if self.peak_R is None else total_R.log2() + self.peak_R
        return values_RD.div_(total_R.masked_fill(total_R == 0, 1.0)[:, None]), lse * math.log(2)


def forward_head(head: KeyValueHead, plan: WorkList, q_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Output [R, D] and logsumexp [R] of one head; the last row means nothing.

    Args:
        q_RD: queries times log2(e) / sqrt(D); the last row is zero.
    """
    state = OnlineSoftmax(q_RD, head.is_bounded(q_RD))
    for tiles in plan.tiles:
        logits = torch.bmm(tiles.rows.view(q_RD), tiles.keys.view(head.k_SD).transpose(1, 2))
        if tiles.masked:
            logits.masked_fill_(later_keys(tiles, head.group), -torch.inf)
        state.add(tiles.rows, logits, tiles.keys.view(head.v_SE))
    for item in plan.items:
        k, v = head.part(item)
        logits = product(rows_of(q_RD, item.rows), k)
        if item.masked:
            logits.masked_fill_(future(item, head), -torch.inf)
        state.add(item.rows, logits, v)
    return state.result()


def backward_head(head: KeyValueHead, plan: WorkList, q_RE: Tensor, grad_RE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [R, D], dk [S, D], dv [S, D] of one head. The products with one more column yield "logits - lse" and
    "grad . v - delta" at no extra cost.

    Args:
        q_RE: queries times log2(e) / sqrt(D), and -log2(e) times the logsumexp of each row over all its keys.
        grad_RE: gradient of the output, and minus delta, where delta is the sum over D of out * grad_out, minus the
            gradient of the logsumexp. The last row of both is zero.
    """
    dim = head.k_SD.shape[1]
    k_SE, v_SE = append_ones(head.k_SD), head.v_SE
    dq_RD = q_RE.new_zeros(len(q_RE), dim)
    dk_DS, dv_DS = (head.k_SD.new_zeros(dim, len(head.k_SD)) for _ in range(2))
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
        q_ME, grad_ME = rows_of(q_RE, item.rows), rows_of(grad_RE, item.rows)
        weights = product(q_ME, k_SE[keys])
        if item.masked:
            weights.masked_fill_(future(item, head), -torch.inf)
        weights.exp2_()
        dv_DS[:, keys].add_(product(grad_ME[:, :dim].t(), weights.t()))
        slope = product(grad_ME, v_SE[keys]).mul_(weights)
        dk_DS[:, keys].add_(product(q_ME[:, :dim].t(), slope.t()))
        add_to_rows(dq_RD, item.rows, product(slope, head.k_SD[keys].t()))
    return dq_RD.mul_(dim**-0.5), dk_DS.t().mul(math.log(2)), dv_DS.t()


def later_keys(tiles: TileItem, group: int) -> Tensor:
    """bool [tile * G, tile]: the keys of a diagonal tile after each row's token."""
    edge = tiles.keys.height
    return torch.ones(edge, edge, dtype=torch.bool).triu_(1).repeat_interleave(group, dim=0)


def future(item: Item, head: KeyValueHead) -> Tensor:
    """bool [m, keys]: keys after the row's own position."""
    keys = torch.arange(item.key_start, item.key_stop)
    rows = item.rows if isinstance(item.rows, Tensor) else torch.arange(item.rows.start, item.rows.stop)
    return keys > (rows // head.group + head.position)[:, None]


def rows_of(x: Tensor, rows: RowSelection) -> Tensor:
    """RowSelection of x; a view of it for slices and tiles."""
    if isinstance(rows, Tensor):
        return x.index_select(0, rows)
    return rows.view(x) if isinstance(rows, RowTiles) else x[rows]


def set_rows(x: Tensor, rows: RowSelection, values: Tensor) -> None:
    """Overwrite rows of x."""
    if isinstance(rows, Tensor):
        x.index_copy_(0, rows, values)
    else:
        rows_of(x, rows).copy_(values)


def add_to_rows(x: Tensor, rows: RowSelection, values: Tensor) -> None:
    """Add to rows of x."""
    if isinstance(rows, Tensor):
        x.index_add_(0, rows, values)
    else:
        rows_of(x, rows).add_(values)
