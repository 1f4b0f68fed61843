"""MoBA attention as a dense mask: slow, readable, differentiated by autograd. The yardstick of the fast kernels.

In chunks of queries it also serves where neither the CPU path nor Triton applies (float64 on a GPU, or a GPU without
Triton): exact, with bounded memory and without a device synchronisation, but with the work of full attention.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout, Problem
from neomoba_dist.model.attention.kernels.select import isolate_damaged, score_dtype

LOGITS_PER_CHUNK = 1 << 26


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: BlockLayout, *, causal: bool, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of the queries from number `first` over the keys of their chosen blocks; see moba.attend."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    mask = selected_keys(block_indices, layout, k.shape[0], causal, first)  # [T, R, S]
    mask = mask.repeat_interleave(num_heads // mask.shape[1], dim=1).unflatten(1, (num_kv_heads, -1))
    dtype = score_dtype(q.dtype)
    k, v = isolate_damaged(k, v)
    queries = q.to(dtype).unflatten(1, (num_kv_heads, -1))
    logits = torch.einsum("thgd,shd->thgs", queries, k.to(dtype)) * head_dim**-0.5
    has_key = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask & has_key, -torch.inf)  # a row without keys is computed over all, then zeroed
    lse = logits.logsumexp(-1)
    out = torch.einsum("thgs,shd->thgd", logits.softmax(-1), v.to(dtype)).masked_fill(~has_key, 0)
    lse = lse.masked_fill(~has_key[..., 0], -torch.inf)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def selected_keys(block_indices: Tensor, layout: BlockLayout, num_keys: int, causal: bool, first: int) -> Tensor:
    """bool [T, R, S]: the keys that each query attends to; its current block, column 0, alone is causally masked."""
    if layout.spans is not None:
        index = torch.arange(num_keys, device=block_indices.device)
        seen = torch.zeros(*block_indices.shape[:2], num_keys, dtype=torch.bool, device=block_indices.device)
        for column in block_indices.unbind(2):
            start, length = layout.spans[column.clamp(min=0)].unsqueeze(-2).unbind(-1)
            seen |= (column >= 0)[..., None] & (index >= start) & (index < start + length)
        return seen
    key_block, key_position = layout.key_positions(num_keys)
    own_mask = block_indices[:, :, :1] == key_block
    if causal:
        _, position = layout.query_positions(first, first + block_indices.shape[0])
        own_mask = own_mask & (key_position <= position[:, None])[:, None]
    others = torch.zeros(*block_indices.shape[:2], layout.num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    others.scatter_(-1, block_indices[:, :, 1:].long() + 1, True)  # column 0 takes the "no block" entries
    return own_mask | others[:, :, key_block + 1]


def _chunks(problem: Problem) -> Iterator[slice]:
    tokens, heads, _ = problem.q.shape
    height = max(1, LOGITS_PER_CHUNK // max(1, heads * problem.k.shape[0]))
    for start in range(0, tokens, height):
        yield slice(start, min(start + height, tokens))


def _attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    assert problem.block_indices is not None
    return attend_reference(
        q, k, v, problem.block_indices[rows], problem.layout, causal=problem.causal, first=rows.start
    )


def attend_chunked(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq]; see moba.attend."""
    q = problem.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # as the operator promises, whatever q's strides
    lse = q.new_empty(q.shape[:2], dtype=score_dtype(q.dtype))
    for rows in _chunks(problem):
        out[rows], lse[rows] = _attend(problem, q[rows], problem.k, problem.v, rows)
    return out, lse


def attend_chunked_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; sums over chunks run in the dtype of the scores. out, lse: recomputed, not read."""
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
