"""MoBA by a library of kernels for packed sequences (varlen.py), in two calls each way.

Forward: the current blocks as sequences of their own; the other choices gathered block by block, one sequence per KV
head and block whose queries are all that chose the block and whose keys are the block; then one merge by logsumexp. So
does the official MoBA (MoonshotAI/MoBA, moba_efficient.py), with keys repeated to the query heads.
Backward: each part from the final output and logsumexp, which is exact; gradients of gathered queries are added back.

Legend: T queries, S keys, Hq/Hkv query and KV heads, D head_dim, N blocks, R rows of the selection, P gathered rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.library.rows import Routes, gather, merge_parts, scatter
from neomoba_dist.model.attention.kernels.library.varlen import Varlen
from neomoba_dist.model.attention.kernels.triton.common import choose_tiles
from neomoba_dist.model.attention.kernels.triton.index import build_index, index_shape
from neomoba_dist.model.attention.kernels.triton.layout import find_current_blocks


class Movers(NamedTuple):
    """What moves rows around the library's calls: functions of rows.py, or of a test."""

    gather: Callable[..., tuple[Tensor, ...]]
    merge: Callable[..., tuple[Tensor, Tensor]]
    scatter: Callable[..., Tensor]


TRITON = Movers(gather, merge_parts, scatter)


class Parts(NamedTuple):
    """The two calls: what a library takes after its tensors (varlen.py), and where the gathered rows stand."""

    own: tuple[Any, ...]
    routed: tuple[Any, ...]
    routes: Routes
    buffer: Tensor  # the index, see triton/index.py


def find_parts(problem: Problem, buffer: Tensor | None = None) -> Parts:
    """Sequences of both calls. buffer: that of an earlier call for the same problem."""
    assert problem.block_indices is not None
    layout, block_indices = problem.layout, problem.block_indices.contiguous()
    (tokens, heads, dim), (keys, kv_heads, _) = problem.q.shape, problem.k.shape
    list_tile, longest = choose_tiles(dim, problem.q.dtype, layout.block_size).rows, min(layout.block_size, keys)
    blocks = find_current_blocks(layout, list_tile).blocks
    if buffer is None:
        buffer = build_index(block_indices, blocks, list_tile)
    index = index_shape(block_indices, layout.num_blocks, list_tile).view(buffer)
    borders = layout.placed.borders if layout.placed is not None else None
    borders = block_borders(blocks) if borders is None else borders
    own = (borders, borders, longest, longest, problem.causal, dim**-0.5)
    if block_indices.shape[2] == 1:
        return Parts(own, (), Routes(index.slots, block_indices, index.first, borders, heads), buffer)
    lists = block_indices.shape[1] // kv_heads  # rows of the selection that share a KV head stand in one sequence
    lengths = index.first.diff().view(kv_heads, lists, -1).transpose(1, 2).flatten()
    ends = lengths.cumsum(0, dtype=torch.int32)
    begins = (ends - lengths).view(kv_heads, -1, lists).transpose(1, 2).reshape(len(index.first), -1)
    shift = (begins - index.first[:, :-1]).contiguous()
    cu_rows = F.pad(ends[lists - 1 :: lists] * (heads // block_indices.shape[1]), (1, 0))
    first_keys = torch.arange(0, kv_heads * keys, keys, dtype=torch.int32, device=borders.device)
    cu_keys = F.pad((first_keys[:, None] + borders[:-1]).flatten(), (0, 1), value=kv_heads * keys)
    routed = (cu_rows, cu_keys, tokens * problem.group, longest, False, dim**-0.5)
    return Parts(own, routed, Routes(index.slots, block_indices, shift, cu_rows, heads), buffer)


def block_borders(blocks: Tensor) -> Tensor:
    """Borders of the blocks among the keys, int32 [N + 1], from `layout.CurrentBlocks.blocks` [N, 5]."""
    return F.pad(blocks[:, 1].cumsum(0, dtype=torch.int32), (1, 0))


def _by_head(x: Tensor) -> Tensor:
    """[S, Hkv, D] -> [Hkv S, 1, D]: the keys of one KV head after those of the other."""
    return x.transpose(0, 1).reshape(-1, 1, x.shape[2])


def attend_library(problem: Problem, library: Varlen, movers: Movers = TRITON) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, Hq, D], logsumexp [T, Hq], and the index, which backward uses again; see moba.attend."""
    q, k, v = problem.q, problem.k, problem.v
    own, routed, routes, buffer = find_parts(problem)
    out, lse = library.forward(q, k, v, *own)
    part = part_lse = None
    if routed:
        (rows,) = movers.gather(q, routes)
        part, part_lse = library.forward(rows, _by_head(k), _by_head(v), *routed)
    return *movers.merge(out, lse, routes, part, part_lse), buffer


def attend_library_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    buffer: Tensor | None,
    library: Varlen,
    movers: Movers = TRITON,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, D], k and v [S, Hkv, D]. buffer: the index that `attend_library` returned, where kept."""
    q, k, v = problem.q, problem.k, problem.v
    own, routed, routes, _ = find_parts(problem, buffer)
    here = routes.block_indices[:, :, 0].repeat_interleave(routes.heads_per_row, 1) >= 0
    own_lse = lse.masked_fill(~here, torch.inf).T.contiguous()  # a query without its current block has no weight there
    dq, dk, dv = library.backward(grad_out, q, k, v, out, own_lse, *own)
    if not routed:
        return dq, dk, dv
    q_rows, grad_rows, out_rows, lse_rows = movers.gather(q, routes, grad_out, out, lse)
    dq_rows, dk_rows, dv_rows = library.backward(
        grad_rows, q_rows, _by_head(k), _by_head(v), out_rows, lse_rows, *routed
    )
    dk, dv = (x + rows.view(k.shape[1], len(k), -1).transpose(0, 1) for x, rows in ((dk, dk_rows), (dv, dv_rows)))
    return movers.scatter(dq, dq_rows, routes), dk, dv
