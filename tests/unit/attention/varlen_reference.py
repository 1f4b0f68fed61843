"""Plain attention over packed sequences with the signatures of kernels/library/varlen.py, in any dtype on the CPU.

What a library leaves undefined is not a number here: rows beyond the last border. So whatever reads them shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.library.varlen import Varlen


def sequences(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys; the borders must keep their promises."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    for (q, q_end), (k, k_end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert 0 <= q_end - q <= max_q
        assert 0 <= k_end - k <= max_k
        yield slice(q, q_end), slice(k, k_end)


def logits(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[Hq, T, S] of one sequence; causal: aligned at the last query and the last key, as in FlashAttention."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("thd,shd->hts", q, keys) * scale
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        found = found.masked_fill(~seen, -torch.inf)
    return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [Hq, T]; 0 and -inf where a sequence has no keys."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for rows, keys in sequences(cu_q, cu_k, max_q, max_k):
        scores = logits(q[rows], k[keys], causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        out[rows] = torch.einsum("hts,shd->thd", weights, v[keys].repeat_interleave(group, 1))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the given out and lse, which may be those of more keys: dS = P (dP - rowsum(grad_out out))."""
    assert lse.shape == (q.shape[1], len(q))
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in sequences(cu_q, cu_k, max_q, max_k):
        weights = (logits(q[rows], k[keys], causal, scale) - lse[:, rows, None]).exp()
        grad, values = grad_out[rows], v[keys].repeat_interleave(group, 1)
        delta = (grad * out[rows]).sum(-1).T[..., None]
        slope = weights * (torch.einsum("thd,shd->hts", grad, values) - delta) * scale
        dq[rows] = torch.einsum("hts,shd->thd", slope, k[keys].repeat_interleave(group, 1))
        for total, part in ((dk, (slope, q[rows])), (dv, (weights, grad))):
            total[keys] = torch.einsum("hts,thd->shd", *part).unflatten(1, (k.shape[1], group)).sum(2)
    return dq, dk, dv


REFERENCE = Varlen(forward, backward)
