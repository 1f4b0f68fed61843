"""MoBA by a library of kernels for packed sequences (varlen.py), in two calls each way.

Forward: the current blocks as sequences of their own; the other choices gathered block by block, one sequence per KV
head and block whose queries are all that chose the block and whose keys are the block; then one merge by logsumexp. So
does the official MoBA (MoonshotAI/MoBA, moba_efficient.py), with keys repeated to the query heads.
Backward: each part from the final output and logsumexp, which is exact; gradients of gathered queries are added back.
All this for some KV heads and their query heads at a time (groups.py), so that what is gathered stays small.

Legend: T queries, S keys, Hq/Hkv query and KV heads, D head_dim, N blocks, R rows of the selection, P gathered rows,
H/h query and KV heads of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.model.attention.kernels.groups import head_groups
from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.library.rows import Routes, gather, merge_parts, scatter
from neomoba_dist.model.attention.kernels.library.varlen import Varlen
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.model.attention.kernels.triton.common import tiles_of, with_current_column
from neomoba_dist.model.attention.kernels.triton.index import BlockIndex, build_index, index_shape
from neomoba_dist.model.attention.kernels.triton.layout import find_current_blocks


class Movers(NamedTuple):
    """What moves rows around the library's calls: functions of rows.py, or of a test."""

    gather: Callable[..., tuple[Tensor, ...]]
    merge: Callable[..., None]
    scatter: Callable[..., None]


TRITON = Movers(gather, merge_parts, scatter)
PADDED_ROWS = 128  # each sequence has at most so many more in FlashAttention's float32 sums of dq


class Part(NamedTuple):
    """The two calls for a group of heads: what a library takes after its tensors (varlen.py), and where rows stand."""

    heads: slice  # query heads
    kv_heads: slice
    own: tuple[Any, ...]
    routed: tuple[Any, ...]  # empty: nothing but the current blocks
    routes: Routes


def find_index(problem: Problem, buffer: Tensor | None) -> tuple[BlockIndex, Tensor, Tensor]:
    """The index, its buffer (of an earlier call for the same problem, or made), borders of the blocks [N + 1]."""
    assert problem.block_indices is not None
    layout = problem.layout
    list_tile = tiles_of(problem).rows
    blocks = find_current_blocks(layout, list_tile).blocks
    if buffer is None:
        buffer = build_index(problem.block_indices, blocks, list_tile)
    index = index_shape(problem.block_indices, layout.num_blocks, list_tile).view(buffer)
    borders = layout.placed.borders if layout.placed is not None else None
    return index, buffer, block_borders(blocks) if borders is None else borders


def find_parts(problem: Problem, index: BlockIndex, borders: Tensor, groups: int) -> list[Part]:
    """Sequences of both calls for each of `groups` equal groups of KV heads."""
    block_indices = problem.block_indices
    assert block_indices is not None
    (tokens, heads, dim), (keys, kv_heads, _) = problem.q.shape, problem.k.shape
    rows, longest = block_indices.shape[1], min(problem.layout.block_size, keys)
    own = (borders, borders, longest, longest, problem.causal, dim**-0.5)
    together, together_kv = heads // groups, kv_heads // groups
    shift, cu_rows = index.first, borders.expand(groups, -1)
    routed: list[tuple[Any, ...]] = [()] * groups
    if block_indices.shape[2] > 1:
        lists = rows // kv_heads  # rows of the selection that share a KV head stand in one sequence
        lengths = index.first.diff().view(kv_heads, lists, -1).transpose(1, 2).reshape(groups, -1)
        ends = lengths.cumsum(1, dtype=torch.int32)
        begins = (ends - lengths).view(kv_heads, -1, lists).transpose(1, 2).reshape(rows, -1)
        shift = (begins - index.first[:, :-1]).contiguous()
        ends = ends[:, lists - 1 :: lists] * (heads // rows)
        sequences = ends.shape[1]
        # rows of a multiple of 16 bytes, so that no variant of a kernel follows from where one begins
        cu_rows = F.pad(ends, (1, -(sequences + 1) % 4))[:, : sequences + 1]
        first_keys = torch.arange(0, together_kv * keys, keys, dtype=torch.int32, device=borders.device)
        cu_keys = F.pad((first_keys[:, None] + borders[:-1]).flatten(), (0, 1), value=together_kv * keys)
        routed = [(cu, cu_keys, tokens * problem.group, longest, False, dim**-0.5) for cu in cu_rows]
    found = []
    for number in range(groups):
        of_group = range(number * together, (number + 1) * together)
        routes = Routes(index.slots, block_indices, shift, cu_rows[number], heads, of_group)
        kv = slice(number * together_kv, (number + 1) * together_kv)
        found.append(Part(slice(of_group.start, of_group.stop), kv, own, routed[number], routes))
    return found


def block_borders(blocks: Tensor) -> Tensor:
    """Borders of the blocks among the keys, int32 [N + 1], from `layout.CurrentBlocks.blocks` [N, 5]."""
    return F.pad(blocks[:, 1].cumsum(0, dtype=torch.int32), (1, 0))


def forward_bytes(problem: Problem) -> int:
    """What the forward pass holds for one KV head beside the output of all: the current blocks' output, keys and
    values, gathered queries and their output, and the logsumexps."""
    rows, queries, keys = _rows(problem)
    return problem.q.shape[2] * problem.q.element_size() * (queries + 2 * keys + 2 * rows) + 4 * (queries + rows)


def backward_bytes(problem: Problem) -> int:
    """The same of the backward pass beside all gradients: the current blocks' gradients, keys and values, gathered
    queries, gradients, outputs and logsumexps, the gradients of the gathered queries and of their keys and values, and
    FlashAttention's float32 sums of dq."""
    rows, queries, keys = _rows(problem)
    sums = rows + PADDED_ROWS * problem.layout.num_blocks
    in_dtype = problem.q.shape[2] * problem.q.element_size() * (queries + 6 * keys + 4 * rows)
    return in_dtype + 4 * problem.q.shape[2] * sums + 4 * rows


def _rows(problem: Problem) -> tuple[int, int, int]:
    """Of one KV head: gathered rows, queries of all its query heads, keys."""
    assert problem.block_indices is not None
    queries = len(problem.q) * problem.group
    return queries * (problem.block_indices.shape[2] - 1), queries, len(problem.k)


def _groups(problem: Problem, bytes_of_one: int) -> int:
    assert problem.block_indices is not None
    return 1 if problem.block_indices.shape[2] == 1 else head_groups(problem.q, problem.k.shape[1], bytes_of_one)


def _by_head(x: Tensor) -> Tensor:
    """[S, h, D] -> [h S, 1, D]: the keys of one KV head after those of the other."""
    return x.transpose(0, 1).reshape(-1, 1, x.shape[2])


def attend_library(
    problem: Problem, library: Varlen, movers: Movers = TRITON, groups: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, Hq, D], logsumexp [T, Hq], and the index, which backward uses again; see moba.attend.

    groups: of KV heads; None: as many as memory asks for.
    """
    problem = problem._replace(block_indices=with_current_column(problem))
    index, buffer, borders = find_index(problem, None)
    out = torch.empty(problem.q.shape, dtype=problem.q.dtype, device=problem.q.device)
    lse = torch.empty(out.shape[:2], dtype=score_dtype(out.dtype), device=out.device)
    groups = _groups(problem, forward_bytes(problem)) if groups is None else groups
    for part in find_parts(problem, index, borders, groups):
        _forward(problem, part, library, movers, out, lse)
    return out, lse, buffer


def _forward(problem: Problem, part: Part, library: Varlen, movers: Movers, out: Tensor, lse: Tensor) -> None:
    """Write the output and the logsumexp of one group."""
    q, k, v = problem.q[:, part.heads], problem.k[:, part.kv_heads], problem.v[:, part.kv_heads]
    own_out, own_lse = library.forward(q, k, v, *part.own)
    found = found_lse = None
    if part.routed:
        (rows,) = movers.gather(problem.q, part.routes)
        found, found_lse = library.forward(rows, _by_head(k), _by_head(v), *part.routed)
    movers.merge(own_out, own_lse, part.routes, found, found_lse, out, lse)


def _own_lse(lse: Tensor, routes: Routes) -> Tensor:
    """[Hq, T]: a query without its current block has no weight there."""
    missing = routes.block_indices[:, :, 0].repeat_interleave(routes.heads_per_row, 1) < 0
    return lse.masked_fill(missing, torch.inf).T.contiguous()


def attend_library_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    buffer: Tensor | None,
    library: Varlen,
    movers: Movers = TRITON,
    groups: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, D], k and v [S, Hkv, D]. buffer: the index that `attend_library` returned, where kept."""
    problem = problem._replace(block_indices=with_current_column(problem))
    index, _, borders = find_index(problem, buffer)
    groups = _groups(problem, backward_bytes(problem)) if groups is None else groups
    parts = find_parts(problem, index, borders, groups)
    own_lse = _own_lse(lse, parts[0].routes)
    if not parts[0].routed:
        return library.backward(grad_out, problem.q, problem.k, problem.v, out, own_lse, *parts[0].own)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (problem.q, problem.k, problem.v))
    for part in parts:
        _backward(problem, part, out, lse, own_lse, grad_out, library, movers, (dq, dk, dv))
    return dq, dk, dv


def _backward(
    problem: Problem,
    part: Part,
    out: Tensor,
    lse: Tensor,
    own_lse: Tensor,
    grad_out: Tensor,
    library: Varlen,
    movers: Movers,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of one group."""
    dq, dk, dv = gradients
    heads, kv_heads = part.heads, part.kv_heads
    q, k, v = problem.q[:, heads], problem.k[:, kv_heads], problem.v[:, kv_heads]
    own_dq, *own = library.backward(grad_out[:, heads], q, k, v, out[:, heads], own_lse[heads], *part.own)
    q_rows, grad_rows, out_rows, lse_rows = movers.gather(problem.q, part.routes, grad_out, out, lse)
    dq_rows, *by_head = library.backward(grad_rows, q_rows, _by_head(k), _by_head(v), out_rows, lse_rows, *part.routed)
    for whole, x, rows in zip((dk, dv), own, by_head, strict=True):
        torch.add(x, rows.view(k.shape[1], len(k), -1).transpose(0, 1), out=whole[:, kv_heads])
    movers.scatter(own_dq, dq_rows, part.routes, dq)
