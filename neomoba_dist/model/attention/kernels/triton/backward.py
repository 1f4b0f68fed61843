# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton backward pass of MoBA from the final output and logsumexp: deterministic, unless atomics are asked for.

dk and dv: key_gradient.py. dq: parts list by list, then the current blocks with the sum of the parts, as in the forward
pass. Or, where `Tiles.atomics` says so and no deterministic algorithms are asked for, dq by the kernels of dk and dv.

Legend: T queries, S keys, Hq/Hkv query and KV heads, BM queries, BN keys per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.groups import head_groups
from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.triton.common import (
    LOG2E,
    Tiles,
    choose_key_tiles,
    kernel,
    last_contiguous,
    load_rows,
    on_its_device,
    padded,
    query_gradient,
    store_rows,
    tiles_of,
    with_current_column,
)
from neomoba_dist.model.attention.kernels.triton.forward import current_tile, list_tile
from neomoba_dist.model.attention.kernels.triton.index import build_index, index_shape
from neomoba_dist.model.attention.kernels.triton.key_gradient import key_gradients, load_statistics
from neomoba_dist.model.attention.kernels.triton.layout import find_current_blocks


@kernel
def delta_kernel(
    out_pointer, grad_pointer, grad_lse_pointer, delta_pointer, tokens, heads, grad_stride_t, grad_stride_h,
    HAS_GRAD_LSE: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """delta float32 [T, Hq]: sum of out * grad over DIM, minus the gradient of the logsumexp."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < tokens
    out = load_rows(out_pointer, rows, valid, head, heads * DIM, DIM, DIM, BD).to(tl.float32)
    grad = load_rows(grad_pointer, rows, valid, head, grad_stride_t, grad_stride_h, DIM, BD).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    cell = rows.to(tl.int64) * heads + head
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_pointer + cell, mask=valid, other=0.0)
    tl.store(delta_pointer + cell, delta, mask=valid)


@kernel
def selected_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, part_pointer, tiles_pointer,
    queries_pointer, first_head, heads, group, heads_per_row, places, num_tiles, scale, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dq [H, places, DIM], without the factor 1/sqrt(DIM), of the chosen blocks, for the H heads from
    first_head on."""
    head = first_head + tl.program_id(1)
    count, start, stop, place, rows, valid = list_tile(tiles_pointer, queries_pointer, head // heads_per_row, places,
                                                       num_tiles, BM)  # fmt: skip
    if count > 0:
        # rows that do not exist compute something of query 0, which is not stored
        q = load_rows(q_pointer, rows, None, head, q_stride_t, q_stride_h, DIM, BD)
        grad = load_rows(grad_pointer, rows, None, head, grad_stride_t, grad_stride_h, DIM, BD)
        lse, delta = load_statistics(lse_pointer, delta_pointer, rows, None, heads, head)
        dq = query_gradient(q, grad, lse, delta, k_pointer, v_pointer, head // group, start, stop, stop, None,
                            scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD,
                            PRECISION)  # fmt: skip
        at = tl.cast(tl.program_id(1), tl.int64) * places + place
        store_rows(part_pointer, dq, at, valid, 0, DIM, 0, DIM, BD)


@kernel
def current_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, part_pointer, slots_pointer, dq_pointer,
    indices_pointer, tiles_pointer, first_head, heads, group, heads_per_row, columns, places, scale, q_stride_t,
    q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, Hq, DIM] of the heads from first_head on: the current blocks' share and the sum of the parts."""
    head = first_head + tl.program_id(1)
    list_rows, list_head = heads // heads_per_row, head // heads_per_row
    rows, valid, start, seen_by_all, last = current_tile(tiles_pointer, indices_pointer, list_rows, list_head, columns,
                                                     CAUSAL, BM)  # fmt: skip
    if tl.max(valid.to(tl.int32), 0) > 0:
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        grad = load_rows(grad_pointer, rows, valid, head, grad_stride_t, grad_stride_h, DIM, BD)
        lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
        dq = query_gradient(q, grad, lse, delta, k_pointer, v_pointer, head // group, start, seen_by_all,
                            tl.max(last, 0), last, scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM,
                            BM, BN, BD, PRECISION)  # fmt: skip
        for column in range(columns - 1):
            slot = slots_pointer + (rows.to(tl.int64) * list_rows + list_head) * (columns - 1) + column
            place = tl.load(slot, mask=valid, other=-1)
            at = tl.cast(tl.program_id(1), tl.int64) * places + place
            dq += load_rows(part_pointer, at, place >= 0, 0, DIM, 0, DIM, BD).to(tl.float32)
        store_rows(dq_pointer, dq * scale, rows, valid, head, heads * DIM, DIM, DIM, BD)


@on_its_device
def attend_triton_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    buffer: Tensor | None = None,
    tiles: Tiles | None = None,
    key_tiles: Tiles | None = None,
    long_list: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, D], k and v [S, Hkv, D]. buffer: the index that `attend_triton` returned, where kept.
    tiles, key_tiles, long_list: None: as chosen in common.py and key_gradient.py. The same bits every time, unless
    key_tiles has atomics and torch.are_deterministic_algorithms_enabled() is false.
    """
    layout, causal = problem.layout, problem.causal
    q, k, v, grad_out = (last_contiguous(x) for x in (problem.q, problem.k, problem.v, grad_out))
    block_indices = with_current_column(problem)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    key_tiles = choose_key_tiles(dim, q.dtype, layout.block_size, tokens) if key_tiles is None else key_tiles
    tiles = tiles_of(problem) if tiles is None else tiles
    make = torch.empty if layout.spans is None else torch.zeros  # given spans may leave keys out
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if tokens == 0:
        return q.new_empty(q.shape), dk.zero_(), dv.zero_()
    columns, heads_per_row = block_indices.shape[2], heads // block_indices.shape[1]
    row_tiles, scale = triton.cdiv(tokens, tiles.rows), dim**-0.5
    launch = {"num_warps": tiles.warps, "num_stages": max(1, tiles.stages - 1)}
    shape = (dim, tiles.rows, tiles.keys, padded(dim), "ieee" if q.dtype == torch.float32 else "tf32")
    delta = torch.empty_like(lse)
    grad_strides = (grad_out.stride(0), grad_out.stride(1))
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *grad_strides)
    delta_kernel[(row_tiles, heads)](
        out, grad_out, grad_lse if grad_lse is None else grad_lse.contiguous(), delta, tokens, heads, *grad_strides,
        grad_lse is not None, dim, tiles.rows, padded(dim),
    )  # fmt: skip
    own = find_current_blocks(layout, tiles.rows)
    buffer = build_index(block_indices, own.blocks, tiles.rows) if buffer is None else buffer
    index = index_shape(block_indices, layout.num_blocks, tiles.rows).view(buffer)
    places, num_tiles = index.queries.shape[1], index.tiles.shape[1]
    by_atomics = key_tiles.atomics and not torch.are_deterministic_algorithms_enabled()
    dq_sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if by_atomics else None
    key_gradients(
        q,
        k,
        v,
        grad_out,
        lse,
        delta,
        dk,
        dv,
        dq_sums,
        block_indices,
        index,
        own.blocks,
        causal,
        layout.block_size,
        key_tiles,
        long_list,
    )
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # not before the sums of long lists are gone
    if dq_sums is not None:
        return torch.mul(dq_sums, scale, out=dq), dk, dv
    together = heads // head_groups(q, heads, places * dim * q.element_size())
    dq_parts = torch.empty(together, places, dim, dtype=q.dtype, device=q.device)
    for first_head in range(0, heads, together):
        if columns > 1:
            selected_query_gradient_kernel[(num_tiles, together)](
                q, k, v, grad_out, lse, delta, dq_parts, index.tiles, index.queries, first_head, heads,
                heads // kv_heads, heads_per_row, places, num_tiles, scale, *strides, *shape, **launch,
            )  # fmt: skip
        current_query_gradient_kernel[(len(own.tiles), together)](
            q, k, v, grad_out, lse, delta, dq_parts, index.slots, dq, block_indices, own.tiles, first_head, heads,
            heads // kv_heads, heads_per_row, columns, places, scale, *strides, causal, dim, own.rows, *shape[2:],
            **launch,
        )  # fmt: skip
    return dq, dk, dv
