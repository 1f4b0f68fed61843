"""The tasks of MoBA's CPU path, independent of each other: one KV head of one document, or of a range of its queries.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, R = Hq or Hkv rows of the routing; a row
of a task is one (query token, query head of the group) pair, and a last row of zeros pads lists of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.kernels.gather_head import Cache, Head, backward_head, forward_head, prepare
from neomoba_dist.model.kernels.gather_plan import HeadPlan, Span, plan_head
from neomoba_dist.model.kernels.layout import BlockLayout
from neomoba_dist.model.kernels.routing import score_dtype


class Problem(NamedTuple):
    """One call: q [T, Hq, D], k and v [S, Hkv, D], routes int32 [T, R, columns] or None for full attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor | None
    layout: BlockLayout
    causal: bool

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


class Document(NamedTuple):
    """One document with queries and keys: where they lie, and how it is computed."""

    queries: slice
    keys: slice
    position: int  # of the first query
    first_block: int
    method: str  # "full", "masked", "gathered", or "cached" for few queries

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


def head_pieces(problem: Problem, doc: Document) -> Iterator[tuple[int, slice]]:
    """(KV head, queries): whole heads, or parts of their queries where there are fewer heads than threads."""
    block_size, num_kv_heads = problem.layout.block_size, problem.k.shape[1]
    blocks = -(-doc.num_queries // block_size)
    pieces = min(-(-torch.get_num_threads() // num_kv_heads), max(1, blocks // 4))
    height = -(-blocks // pieces) * block_size
    for head in range(num_kv_heads):
        for start in range(doc.queries.start, doc.queries.stop, height):
            yield head, slice(start, min(start + height, doc.queries.stop))


def forward_task(problem: Problem, doc: Document, head: int, rows: slice, out: Tensor, lse: Tensor) -> None:
    """Write the head's share of out [T, Hq, D] and lse [T, Hq]."""
    group = problem.group
    q_RD = _head_rows(problem.q, head, group, rows)
    q_RD *= query_scale(problem)
    keys: Head | Cache
    if doc.method == "cached":
        keys = Cache(problem.k[doc.keys, head], problem.v[doc.keys, head], *_place(problem, doc, rows))
    else:
        keys = _load(problem, doc, head, rows)
    values_RD, lse_R = forward_head(keys, _plan(problem, doc, head, rows), q_RD)
    heads = slice(head * group, (head + 1) * group)
    out[rows, heads] = values_RD[:-1].unflatten(0, (-1, group)).to(out.dtype)
    lse[rows, heads] = lse_R[:-1].unflatten(0, (-1, group))


def backward_task(
    problem: Problem,
    doc: Document,
    head: int,
    rows: slice,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the head's share of dq [T, Hq, D]; return its dk and dv, [S, D] each."""
    group, dtype = problem.group, score_dtype(problem.q.dtype)
    heads = slice(head * group, (head + 1) * group)
    delta = (out[rows, heads].to(dtype) * grad_out[rows, heads]).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse[rows, heads]
    q_RE = _head_rows(problem.q, head, group, rows, lse[rows, heads] * -math.log2(math.e))
    q_RE[:, :-1] *= query_scale(problem)
    grad_RE = _head_rows(grad_out, head, group, rows, -delta)
    plan = _plan(problem, doc, head, rows)
    dq_RD, dk_SD, dv_SD = backward_head(_load(problem, doc, head, rows), plan, q_RE, grad_RE)
    dq[rows, heads] = dq_RD[:-1].unflatten(0, (-1, group)).to(dq.dtype)
    return dk_SD, dv_SD


def query_scale(problem: Problem) -> float:
    """What turns queries into logits of powers of two."""
    return math.log2(math.e) * problem.q.shape[2] ** -0.5


def _load(problem: Problem, doc: Document, head: int, rows: slice) -> Head:
    """One KV head of the document."""
    return Head(*prepare(problem.k[doc.keys, head], problem.v[doc.keys, head]), *_place(problem, doc, rows))


def _place(problem: Problem, doc: Document, rows: slice) -> tuple[int, int]:
    """Queries per KV head, and position of the first query."""
    return problem.group, doc.position + rows.start - doc.queries.start


def _head_rows(x: Tensor, head: int, group: int, rows: slice, column: Tensor | None = None) -> Tensor:
    """A copy [tokens * G + 1, D] of one KV head's queries in the dtype of the scores; the last row is 0.

    `column` [tokens, G] becomes one more column.
    """
    part = x[rows, head * group : (head + 1) * group]
    tokens, _, dim = part.shape
    copy = torch.empty((tokens * group + 1, dim + (column is not None)), dtype=score_dtype(x.dtype))
    copy[:-1, :dim].unflatten(0, (tokens, group)).copy_(part)
    if column is not None:
        copy[:-1, dim].unflatten(0, (tokens, group)).copy_(column)
    copy[-1] = 0
    return copy


def _plan(problem: Problem, doc: Document, head: int, rows: slice) -> HeadPlan:
    """The work list of one task."""
    group, routes = problem.group, problem.routes
    assert routes is not None
    first_head, heads = (head * group, group) if routes.shape[1] == problem.q.shape[1] else (head, 1)
    chosen_TGC = routes[rows, first_head : first_head + heads].expand(-1, group, -1)
    position = doc.position + rows.start - doc.queries.start
    layout = problem.layout
    spans = None if layout.spans is None else [(start, start + length) for start, length in layout.spans.tolist()]
    span = Span(rows.start, rows.stop, position, doc.num_keys, layout.block_size, problem.causal, spans)
    return plan_head(span, chosen_TGC, doc.first_block, tiled=doc.method != "cached")
