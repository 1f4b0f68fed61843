"""The tasks of MoBA's CPU path, independent of each other: one KV head of one document, or of a range of its queries.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, R = Hq or Hkv rows of the selection; a
row of a task is one (query token, query head of the group) pair, and a last row of zeros pads lists of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu.head import (
    KeyValueHead,
    backward_head,
    forward_head,
    prepare,
)
from neomoba_dist.model.attention.kernels.cpu.plan import PlannedQueries, WorkList, list_work
from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.select import score_dtype


class Document(NamedTuple):
    """One document with queries and keys: where they lie, and how it is computed."""

    queries: slice
    keys: slice
    position: int  # of the first query
    first_block: int
    method: str  # "full", "masked", "gathered", or "few" for few queries

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


class Task(NamedTuple):
    """Queries `rows` of one KV head of a document."""

    problem: Problem
    doc: Document
    head: int
    rows: slice

    @property
    def query_heads(self) -> slice:
        return slice(self.head * self.problem.group, (self.head + 1) * self.problem.group)

    @property
    def position(self) -> int:
        """Position of the first query."""
        return self.doc.position + self.rows.start - self.doc.queries.start

    @property
    def chosen_blocks(self) -> Tensor:
        """int [tokens, G, columns]: global block numbers, -1 for none."""
        block_indices = self.problem.block_indices
        assert block_indices is not None
        per_head = block_indices.shape[1] == self.problem.q.shape[1]
        heads = self.query_heads if per_head else slice(self.head, self.head + 1)
        return block_indices[self.rows, heads].expand(-1, self.problem.group, -1)

    def write(self, x: Tensor, rows_R: Tensor) -> None:
        """Put rows [tokens * G + 1, ...] into their places of x [T, Hq, ...]; the last one means nothing."""
        x[self.rows, self.query_heads] = rows_R[:-1].unflatten(0, (-1, self.problem.group)).to(x.dtype)


def split_document(problem: Problem, doc: Document) -> Iterator[Task]:
    """Whole heads, or parts of their queries where there are fewer heads than threads."""
    block_size, num_kv_heads = problem.layout.block_size, problem.k.shape[1]
    blocks = -(-doc.num_queries // block_size)
    pieces = min(-(-torch.get_num_threads() // num_kv_heads), max(1, blocks // 4))
    height = -(-blocks // pieces) * block_size
    for head in range(num_kv_heads):
        for start in range(doc.queries.start, doc.queries.stop, height):
            yield Task(problem, doc, head, slice(start, min(start + height, doc.queries.stop)))


def forward_task(task: Task, out: Tensor, lse: Tensor) -> None:
    """Write the task's share of out [T, Hq, D] and lse [T, Hq]."""
    q_RD = _query_rows(task, task.problem.q)
    q_RD *= query_scale(task.problem)
    values_RD, lse_R = forward_head(_load(task), _plan(task), q_RD)
    task.write(out, values_RD)
    task.write(lse, lse_R)


def backward_task(
    task: Task, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the task's share of dq [T, Hq, D]; return its dk and dv, [S, D] each."""
    problem, rows, heads = task.problem, task.rows, task.query_heads
    delta = (out[rows, heads].to(score_dtype(out.dtype)) * grad_out[rows, heads]).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse[rows, heads]
    q_RE = _query_rows(task, problem.q, lse[rows, heads] * -math.log2(math.e))
    q_RE[:, :-1] *= query_scale(problem)
    grad_RE = _query_rows(task, grad_out, -delta)
    dq_RD, dk_SD, dv_SD = backward_head(_load(task), _plan(task), q_RE, grad_RE)
    task.write(dq, dq_RD)
    return dk_SD, dv_SD


def query_scale(problem: Problem) -> float:
    """What turns queries into logits of powers of two."""
    return math.log2(math.e) * problem.q.shape[2] ** -0.5


def _load(task: Task) -> KeyValueHead:
    problem, keys = task.problem, task.doc.keys
    k_SD, v_SE = prepare(problem.k[keys, task.head], problem.v[keys, task.head])
    return KeyValueHead(k_SD, v_SE, problem.group, task.position)


def _query_rows(task: Task, x: Tensor, column: Tensor | None = None) -> Tensor:
    """A copy [tokens * G + 1, D] of the task's rows of x [T, Hq, D] in the dtype of the scores; the last row is 0.

    `column` [tokens, G] becomes one more column.
    """
    part = x[task.rows, task.query_heads]
    tokens, group, dim = part.shape
    copy = torch.empty((tokens * group + 1, dim + (column is not None)), dtype=score_dtype(x.dtype))
    copy[:-1, :dim].unflatten(0, (tokens, group)).copy_(part)
    if column is not None:
        copy[:-1, dim].unflatten(0, (tokens, group)).copy_(column)
    copy[-1] = 0
    return copy


def _plan(task: Task) -> WorkList:
    """The work list of one task."""
    problem, doc, rows, layout = task.problem, task.doc, task.rows, task.problem.layout
    spans = None if layout.spans is None else [(start, start + length) for start, length in layout.spans.tolist()]
    queries = PlannedQueries(
        rows.start, rows.stop, task.position, doc.num_keys, layout.block_size, problem.causal, spans
    )
    return list_work(queries, task.chosen_blocks, doc.first_block)
