# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels around a library's: queries to the rows of the blocks that they chose, and results back.

Each program takes a tile of queries of one head and finds the rows of its entries through `BlockIndex.slots`. So no
two programs write to one row, no atomics are needed, and sums run over the columns in their order. One launch serves
the heads of one group (groups.py).

Legend: T queries, Hq query heads, H those of the group, R rows of the selection, C columns of other blocks, N blocks,
P = T C H gathered rows (an upper bound), DIM head_dim, BM queries per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.triton.common import (
    LOG2E,
    kernel,
    last_contiguous,
    load_rows,
    merge,
    on_its_device,
    padded,
    store_rows,
)

BM = 64
TAIL = 256  # rows past the last one that a library's tile may read: they must be numbers


class Routes(NamedTuple):
    """Where each choice of a query stands among the gathered rows of a group of heads.

    Row `(place + shift[list, block]) * heads_per_row + member` holds a query head, where `place` is its slot, `list`
    its row of the selection and `member` its number among the heads that share it.
    """

    slots: Tensor  # int32 [T, R, C], -1: no block
    block_indices: Tensor  # int32 [T, R, 1 + C], those of the current blocks first
    shift: Tensor  # int32 [R, N]
    borders: Tensor  # int32 [sequences + 1]: rows of each sequence of the group; the last is their number
    all_heads: int  # Hq
    heads: range  # those of the group

    @property
    def heads_per_row(self) -> int:
        return self.all_heads // self.slots.shape[1]

    @property
    def rows(self) -> int:
        return len(self.slots) * self.slots.shape[2] * len(self.heads)


@triton.jit
def find_rows(
    slots_pointer, indices_pointer, shift_pointer, t, valid, head, heads, heads_per_row, columns, num_blocks, column
):  # fmt: skip
    """(rows int64 [BM], which exist) of the queries' choices in a column."""
    list_row = head // heads_per_row
    entry = t.to(tl.int64) * (heads // heads_per_row) + list_row
    place = tl.load(slots_pointer + entry * (columns - 1) + column, mask=valid, other=-1)
    there = place >= 0
    block = tl.load(indices_pointer + entry * columns + 1 + column, mask=there, other=0)
    place += tl.load(shift_pointer + list_row * num_blocks + block, mask=there, other=0)
    return place.to(tl.int64) * heads_per_row + head % heads_per_row, there


@triton.jit
def clear_tail(rows_pointer, total, places, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):
    """Zeros in the rows that follow the last one."""
    for start in range(total, tl.minimum(total + TAIL, places), BM):
        row = start + tl.arange(0, BM)
        zeros = tl.zeros([BM, BD], tl.float32)
        store_rows(rows_pointer, zeros, row, row < tl.minimum(total + TAIL, places), 0, DIM, 0, DIM, BD)


@kernel
def gather_rows_kernel(
    q_pointer, grad_pointer, out_pointer, lse_pointer, q_rows_pointer, grad_rows_pointer, out_rows_pointer,
    lse_rows_pointer, slots_pointer, indices_pointer, shift_pointer, borders_pointer, tokens, first_head, heads,
    heads_per_row, columns, num_blocks, places, parts, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows [P, DIM] of q; with grad_pointer also those of grad and out [T, Hq, DIM] and of lse [T, Hq]."""
    head = first_head + tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = t < tokens
    for column in range(columns - 1):
        row, there = find_rows(slots_pointer, indices_pointer, shift_pointer, t, valid, head, heads, heads_per_row,
                               columns, num_blocks, column)  # fmt: skip
        q = load_rows(q_pointer, t, valid, head, q_stride_t, q_stride_h, DIM, BD)
        store_rows(q_rows_pointer, q, row, there, 0, DIM, 0, DIM, BD)
        if grad_pointer is not None:
            grad = load_rows(grad_pointer, t, valid, head, grad_stride_t, grad_stride_h, DIM, BD)
            store_rows(grad_rows_pointer, grad, row, there, 0, DIM, 0, DIM, BD)
            out = load_rows(out_pointer, t, valid, head, heads * DIM, DIM, DIM, BD)
            store_rows(out_rows_pointer, out, row, there, 0, DIM, 0, DIM, BD)
            lse = tl.load(lse_pointer + t.to(tl.int64) * heads + head, mask=valid, other=0.0)
            tl.store(lse_rows_pointer + row, lse, mask=there)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        total = tl.load(borders_pointer + parts)
        clear_tail(q_rows_pointer, total, places, DIM, BM, BD, TAIL)
        if grad_pointer is not None:
            clear_tail(grad_rows_pointer, total, places, DIM, BM, BD, TAIL)
            clear_tail(out_rows_pointer, total, places, DIM, BM, BD, TAIL)


@kernel
def merge_rows_kernel(
    own_out_pointer, own_lse_pointer, part_pointer, part_lse_pointer, out_pointer, lse_pointer, slots_pointer,
    indices_pointer, shift_pointer, tokens, first_head, heads, heads_per_row, columns, num_blocks, DIM: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [T, Hq, DIM] and lse [T, Hq] of the group's heads: own_out [T, H, DIM], own_lse [H, T] and the parts."""
    own_head, head = tl.program_id(1), first_head + tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = t < tokens
    out = load_rows(own_out_pointer, t, valid, own_head, tl.num_programs(1) * DIM, DIM, DIM, BD).to(tl.float32)
    lse = tl.load(own_lse_pointer + tl.cast(own_head, tl.int64) * tokens + t, mask=valid, other=0.0) * LOG2E
    entry = t.to(tl.int64) * (heads // heads_per_row) + head // heads_per_row
    own = tl.load(indices_pointer + entry * columns, mask=valid, other=-1) >= 0
    out = tl.where(own[:, None], out, 0.0)
    lse = tl.where(own, lse, float("-inf"))
    for column in range(columns - 1):
        row, there = find_rows(slots_pointer, indices_pointer, shift_pointer, t, valid, head, heads, heads_per_row,
                               columns, num_blocks, column)  # fmt: skip
        part = load_rows(part_pointer, row, there, 0, DIM, 0, DIM, BD).to(tl.float32)
        part_lse = tl.load(part_lse_pointer + row, mask=there, other=float("-inf")) * LOG2E
        out, lse = merge(part, part_lse, out, lse)
    store_rows(out_pointer, out, t, valid, head, heads * DIM, DIM, DIM, BD)
    tl.store(lse_pointer + t.to(tl.int64) * heads + head, lse / LOG2E, mask=valid)


@kernel
def scatter_rows_kernel(
    own_dq_pointer, dq_rows_pointer, dq_pointer, slots_pointer, indices_pointer, shift_pointer, tokens, first_head,
    heads, heads_per_row, columns, num_blocks, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq [T, Hq, DIM] of the group's heads: that of the current blocks [T, H, DIM] plus that of the rows [P, DIM]."""
    own_head, head = tl.program_id(1), first_head + tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = t < tokens
    dq = load_rows(own_dq_pointer, t, valid, own_head, tl.num_programs(1) * DIM, DIM, DIM, BD).to(tl.float32)
    for column in range(columns - 1):
        row, there = find_rows(slots_pointer, indices_pointer, shift_pointer, t, valid, head, heads, heads_per_row,
                               columns, num_blocks, column)  # fmt: skip
        dq += load_rows(dq_rows_pointer, row, there, 0, DIM, 0, DIM, BD).to(tl.float32)
    store_rows(dq_pointer, dq, t, valid, head, heads * DIM, DIM, DIM, BD)


def _sizes(routes: Routes) -> tuple[int, ...]:
    sizes = (routes.heads.start, routes.all_heads, routes.heads_per_row, routes.block_indices.shape[2])
    return len(routes.slots), *sizes, routes.shift.shape[1]


def _grid(routes: Routes) -> tuple[int, int]:
    return triton.cdiv(len(routes.slots), BM), len(routes.heads)


def _shape(dim: int) -> tuple[int, int, int]:
    return dim, BM, padded(dim)


@on_its_device
def gather(
    q: Tensor, routes: Routes, grad: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The rows of q [T, Hq, D] in the order of the sequences, [P, 1, D]; with grad, out [T, Hq, D] and lse [T, Hq] also
    theirs, the last [1, P]."""
    dim, rows = q.shape[2], routes.rows
    q = last_contiguous(q)
    grad = q if grad is None else last_contiguous(grad)
    count = 1 if lse is None else 3
    found = [torch.empty(rows, 1, dim, dtype=q.dtype, device=q.device) for _ in range(count)]
    found_lse = None if lse is None else lse.new_zeros(1, rows)
    given = (grad, out, lse) if lse is not None else (None, None, None)
    gather_rows_kernel[_grid(routes)](
        q, *given, *found, *[None] * (3 - count), found_lse, routes.slots, routes.block_indices, routes.shift,
        routes.borders, *_sizes(routes), rows, len(routes.borders) - 1, q.stride(0), q.stride(1), grad.stride(0),
        grad.stride(1), *_shape(dim), TAIL,
    )  # fmt: skip
    return (*found, found_lse) if found_lse is not None else (found[0],)


@on_its_device
def merge_parts(
    own_out: Tensor,
    own_lse: Tensor,
    routes: Routes,
    part: Tensor | None,
    part_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write out [T, Hq, D] and lse [T, Hq] of the group's heads: the current blocks' own_out [T, H, D] and own_lse
    [H, T] merged with parts [P, 1, D]; None where there are none."""
    merge_rows_kernel[_grid(routes)](
        own_out.contiguous(), own_lse, part, part_lse, out, lse, routes.slots, routes.block_indices, routes.shift,
        *_sizes(routes), *_shape(out.shape[2]),
    )  # fmt: skip


@on_its_device
def scatter(own_dq: Tensor, dq_rows: Tensor, routes: Routes, dq: Tensor) -> None:
    """Write dq [T, Hq, D] of the group's heads: own_dq [T, H, D] plus the gradients of the gathered rows."""
    scatter_rows_kernel[_grid(routes)](
        own_dq.contiguous(), dq_rows, dq, routes.slots, routes.block_indices, routes.shift, *_sizes(routes),
        *_shape(dq.shape[2]),
    )  # fmt: skip
