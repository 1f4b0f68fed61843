"""MoBA where neither the CPU path nor Triton applies (float64 on a GPU, or a GPU without Triton).

The dense-mask reference on chunks of queries, so that memory stays bounded; recomputed in the backward pass. Exact, and
without a device synchronisation, but it does the work of full attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu.tasks import Problem
from neomoba_dist.model.attention.kernels.reference import attend_reference
from neomoba_dist.model.attention.kernels.select import score_dtype

LOGITS_PER_CHUNK = 1 << 26


def _chunks(problem: Problem) -> Iterator[slice]:
    tokens, heads, _ = problem.q.shape
    height = max(1, LOGITS_PER_CHUNK // max(1, heads * problem.k.shape[0]))
    for start in range(0, tokens, height):
        yield slice(start, min(start + height, tokens))


def _attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    assert problem.routes is not None
    return attend_reference(q, k, v, problem.routes[rows], problem.layout, causal=problem.causal, first=rows.start)


def attend_chunked(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq]; see moba.attend."""
    q = problem.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # as the operator promises, whatever q's strides
    lse = q.new_empty(q.shape[:2], dtype=score_dtype(q.dtype))
    for rows in _chunks(problem):
        out[rows], lse[rows] = _attend(problem, q[rows], problem.k, problem.v, rows)
    return out, lse


def attend_chunked_backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; sums over chunks run in the dtype of the scores."""
    dtype = score_dtype(problem.q.dtype)
    k, v = problem.k, problem.v
    dq = torch.empty_like(problem.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    for rows in _chunks(problem):
        # torch.autograd is switched off inside a custom operator, torch.func is not
        results, pull_back = torch.func.vjp(partial(_attend, problem, rows=rows), problem.q[rows], k, v)[:2]
        part_grad_lse = torch.zeros_like(results[1]) if grad_lse is None else grad_lse[rows]
        dq[rows], part_dk, part_dv = pull_back((grad_out[rows], part_grad_lse))
        dk += part_dk
        dv += part_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)
