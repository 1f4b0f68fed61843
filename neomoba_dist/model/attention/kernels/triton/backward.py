# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton backward pass of MoBA from the final output and logsumexp: deterministic, without atomics.

dk and dv: one program per part of a block and KV head walks the lists of queries that chose the block, then the
queries whose current block it is. dq: parts list by list, then the current blocks with the sum of the parts, as in the
forward pass.

Legend: T queries, S keys, Hq/Hkv query and KV heads, R rows of the selection, N blocks, BM queries, BN keys per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.triton.common import (
    LOG2E,
    Tiles,
    choose_key_tiles,
    choose_tiles,
    kernel,
    last_contiguous,
    load_rows,
    on_its_device,
    padded,
    query_gradient,
    store_rows,
    with_current_column,
)
from neomoba_dist.model.attention.kernels.triton.forward import current_tile, list_tile
from neomoba_dist.model.attention.kernels.triton.index import build_index, index_shape
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


@triton.jit
def load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head):
    """(lse in powers of two, delta) of some rows; those not valid get lse +inf, which makes their weights 0."""
    cell = rows.to(tl.int64) * heads + head
    if valid is None:
        lse, delta = tl.load(lse_pointer + cell), tl.load(delta_pointer + cell)
    else:
        lse = tl.load(lse_pointer + cell, mask=valid, other=float("inf"))
        delta = tl.load(delta_pointer + cell, mask=valid, other=0.0)
    return lse * LOG2E, delta


@triton.jit
def add_key_gradients(
    dk, dv, k, v, rows, valid, visible, q_pointer, grad_pointer, lse_pointer, delta_pointer, heads, head, scale,
    q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of some queries to dk and dv [BN, BD].

    valid: which queries count. visible: the keys that each sees; None: all, and every row can be read.
    """
    there = None if visible is None else valid
    q = load_rows(q_pointer, rows, there, head, q_stride_t, q_stride_h, DIM, BD)
    grad = load_rows(grad_pointer, rows, there, head, grad_stride_t, grad_stride_h, DIM, BD)
    lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.exp2(logits - lse[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    slope = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@kernel
def key_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, dk_pointer, dv_pointer, indices_pointer,
    queries_pointer, first_pointer, blocks_pointer, heads, kv_heads, heads_per_row, columns, num_blocks, places,
    parts, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h,
    DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk and dv [S, Hkv, DIM] of BN keys of one block."""
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    kv_head = tl.program_id(1)
    group, list_rows = heads // kv_heads, heads // heads_per_row
    found = blocks_pointer + block * 5
    start, length = tl.load(found), tl.load(found + 1)
    own_begin, own_end, own_place = tl.load(found + 2), tl.load(found + 3), tl.load(found + 4)
    shift = start + own_place - own_begin  # from the number of an own query to its position among the keys
    if part * BN < length:
        n = start + part * BN + tl.arange(0, BN)
        inside = n < start + length
        k = load_rows(k_pointer, n, inside, kv_head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, inside, kv_head, v_stride_t, v_stride_h, DIM, BD)
        dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
        if CAUSAL:  # queries before the first key of this part see none of it
            own_begin += tl.maximum(part * BN - own_place, 0)
        for member in range(group):
            head = kv_head * group + member
            list_row = head // heads_per_row
            cell = first_pointer + list_row * (num_blocks + 1) + block
            begin, end = 0, 0
            if columns > 1:
                begin, end = tl.load(cell), tl.load(cell + 1)
            entries = queries_pointer + list_row.to(tl.int64) * places
            for place in range(begin, end, BM):
                at = place + tl.arange(0, BM)
                # past the end stands the last query again, with weights of 0: nothing else needs a mask
                rows = tl.load(entries + tl.minimum(at, end - 1))
                dk, dv = add_key_gradients(
                    dk, dv, k, v, rows, at < end, None, q_pointer, grad_pointer, lse_pointer, delta_pointer,
                    heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD, PRECISION,
                )  # fmt: skip
            for place in range(own_begin, own_end, BM):
                rows = place + tl.arange(0, BM)
                valid = current_queries(indices_pointer, rows, own_end, list_rows, list_row, columns)
                visible = valid[None, :]
                if CAUSAL:
                    visible &= n[:, None] <= (rows + shift)[None, :]
                dk, dv = add_key_gradients(
                    dk, dv, k, v, rows, valid, visible, q_pointer, grad_pointer, lse_pointer, delta_pointer,
                    heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD, PRECISION,
                )  # fmt: skip
        store_rows(dk_pointer, dk * scale, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)
        store_rows(dv_pointer, dv, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)


@triton.jit
def current_queries(indices_pointer, rows, end, list_rows, list_row, columns):
    """Which of the queries stand before `end` and chose their current block."""
    chosen = indices_pointer + (rows.to(tl.int64) * list_rows + list_row) * columns
    return (rows < end) & (tl.load(chosen, mask=rows < end, other=-1) >= 0)


@kernel
def selected_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, part_pointer, tiles_pointer,
    queries_pointer, heads, group, heads_per_row, places, num_tiles, scale, q_stride_t, q_stride_h, k_stride_t,
    k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dq [Hq, places, DIM], without the factor 1/sqrt(DIM), of the chosen blocks."""
    head = tl.program_id(1)
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
        store_rows(part_pointer, dq, tl.cast(head, tl.int64) * places + place, valid, 0, DIM, 0, DIM, BD)


@kernel
def current_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, part_pointer, slots_pointer, dq_pointer,
    indices_pointer, tiles_pointer, heads, group, heads_per_row, columns, places, scale, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, Hq, DIM]: the current blocks' share and the sum of the parts."""
    head = tl.program_id(1)
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
            at = tl.cast(head, tl.int64) * places + place
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, D], k and v [S, Hkv, D]. buffer: the index that `attend_triton` returned, where kept."""
    layout, causal = problem.layout, problem.causal
    q, k, v, grad_out = (last_contiguous(x) for x in (problem.q, problem.k, problem.v, grad_out))
    block_indices = with_current_column(problem)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    key_tiles = choose_key_tiles(dim, q.dtype, layout.block_size) if key_tiles is None else key_tiles
    tiles = choose_tiles(dim, q.dtype, layout.block_size) if tiles is None else tiles
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    make = torch.empty if layout.spans is None else torch.zeros  # given spans may leave keys out
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if tokens == 0:
        return dq, dk.zero_(), dv.zero_()
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
    parts = triton.cdiv(layout.block_size, key_tiles.keys)
    key_gradient_kernel[(layout.num_blocks * parts, kv_heads)](
        q, k, v, grad_out, lse, delta, dk, dv, block_indices, index.queries, index.first, own.blocks, heads, kv_heads,
        heads_per_row, columns, layout.num_blocks, places, parts, scale, *strides, dim,
        key_tiles.rows, key_tiles.keys, *shape[3:], causal, num_warps=key_tiles.warps, num_stages=key_tiles.stages,
    )  # fmt: skip
    dq_parts = torch.empty(heads, places, dim, dtype=q.dtype, device=q.device)
    if columns > 1:
        selected_query_gradient_kernel[(num_tiles, heads)](
            q, k, v, grad_out, lse, delta, dq_parts, index.tiles, index.queries, heads, heads // kv_heads,
            heads_per_row, places, num_tiles, scale, *strides, *shape, **launch,
        )  # fmt: skip
    current_query_gradient_kernel[(len(own.tiles), heads)](
        q, k, v, grad_out, lse, delta, dq_parts, index.slots, dq, block_indices, own.tiles, heads, heads // kv_heads,
        heads_per_row, columns, places, scale, *strides, causal, dim, own.rows, *shape[2:], **launch,
    )  # fmt: skip
    return dq, dk, dv
