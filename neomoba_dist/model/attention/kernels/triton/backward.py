# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton backward pass of MoBA from the final output and logsumexp: deterministic, without atomics.

dk and dv: one program per part of a block and KV head walks the lists of queries that chose the block, then the
queries whose own block it is. dq: routed blocks column by column into float32 sums, then the own blocks, as in the
forward pass.

Legend: T queries, S keys, Hq/Hkv query and KV heads, R rows of the routing, N blocks, BM queries, BN keys per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout
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
    with_own_column,
)
from neomoba_dist.model.attention.kernels.triton.forward import list_tile, own_tile
from neomoba_dist.model.attention.kernels.triton.index import build_index
from neomoba_dist.model.attention.kernels.triton.layout import find_own_places


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
    """(lse in powers of two, delta) of some rows; invalid rows get lse +inf, which makes their weights 0."""
    cell = rows.to(tl.int64) * heads + head
    lse = tl.load(lse_pointer + cell, mask=valid, other=float("inf")) * LOG2E
    return lse, tl.load(delta_pointer + cell, mask=valid, other=0.0)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, n, row_last, rows, valid, q_pointer, grad_pointer, lse_pointer, delta_pointer, heads, head, scale,
    q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of some query rows to dk and dv [BN, BD]; a row sees the keys n before its row_last."""
    q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
    grad = load_rows(grad_pointer, rows, valid, head, grad_stride_t, grad_stride_h, DIM, BD)
    lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.where(n[:, None] < row_last[None, :], tl.exp2(logits - lse[None, :]), 0.0)
    dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
    slope = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    dk += tl.dot(slope.to(q.dtype), q, input_precision=PRECISION)
    return dk, dv


@kernel
def key_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, dk_pointer, dv_pointer, routes_pointer,
    rows_pointer, first_pointer, blocks_pointer, tokens, heads, kv_heads, heads_per_row, columns, num_blocks,
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
        everything = tl.full([BM], 2147483647, tl.int32)
        if CAUSAL:  # queries before the first key of this part see none of it
            own_begin += tl.maximum(part * BN - own_place, 0)
        for member in range(group):
            head = kv_head * group + member
            for column in range(columns - 1):
                list_row = column * list_rows + head // heads_per_row
                cell = first_pointer + list_row * (num_blocks + 1) + block
                list_end = tl.load(cell + 1)
                for place in range(tl.load(cell), list_end, BM):
                    at = place + tl.arange(0, BM)
                    valid = at < list_end
                    rows = tl.load(rows_pointer + tl.cast(list_row, tl.int64) * tokens + at, mask=valid, other=0)
                    dk, dv = add_key_gradients(
                        dk, dv, k, v, n, everything, rows, valid, q_pointer, grad_pointer, lse_pointer, delta_pointer,
                        heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD, PRECISION,
                    )  # fmt: skip
            for place in range(own_begin, own_end, BM):
                rows = place + tl.arange(0, BM)
                route = routes_pointer + (rows.to(tl.int64) * list_rows + head // heads_per_row) * columns
                valid = (rows < own_end) & (tl.load(route, mask=rows < own_end, other=-1) >= 0)
                row_last = everything
                if CAUSAL:
                    row_last = tl.where(valid, rows + shift + 1, 0)
                dk, dv = add_key_gradients(
                    dk, dv, k, v, n, row_last, rows, valid, q_pointer, grad_pointer, lse_pointer, delta_pointer,
                    heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD, PRECISION,
                )  # fmt: skip
        store_rows(dk_pointer, dk * scale, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)
        store_rows(dv_pointer, dv, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)


@kernel
def routed_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, acc_pointer, rows_pointer, first_pointer,
    tile_block_pointer, first_tile_pointer, blocks_pointer, column, tokens, heads, group, heads_per_row,
    num_blocks, num_tiles, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t,
    grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one column's share of dq, without the factor 1/sqrt(DIM), to acc float32 [T, Hq, DIM]."""
    tile, head = tl.program_id(0), tl.program_id(1)
    list_row = column * (heads // heads_per_row) + head // heads_per_row
    block, rows, valid = list_tile(rows_pointer, first_pointer, tile_block_pointer, first_tile_pointer, list_row, tile,
                                   tokens, num_blocks, num_tiles, BM)  # fmt: skip
    if block < num_blocks:
        start = tl.load(blocks_pointer + block * 5)
        stop = start + tl.load(blocks_pointer + block * 5 + 1)
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        grad = load_rows(grad_pointer, rows, valid, head, grad_stride_t, grad_stride_h, DIM, BD)
        lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
        first, last = tl.zeros([BM], tl.int32) + start, tl.zeros([BM], tl.int32) + stop
        dq = query_gradient(q, grad, lse, delta, k_pointer, v_pointer, head // group, start, stop, first, last,
                            scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD,
                            PRECISION)  # fmt: skip
        dq += load_rows(acc_pointer, rows, valid, head, heads * DIM, DIM, DIM, BD)
        store_rows(acc_pointer, dq, rows, valid, head, heads * DIM, DIM, DIM, BD)


@kernel
def own_query_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, acc_pointer, dq_pointer, routes_pointer,
    tiles_pointer, heads, group, heads_per_row, columns, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, CAUSAL: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, Hq, DIM]: the own blocks' share and the routed sums."""
    head = tl.program_id(1)
    rows, valid, start, last = own_tile(tiles_pointer, routes_pointer, heads // heads_per_row, head // heads_per_row,
                                        columns, CAUSAL, BM)  # fmt: skip
    if tl.max(valid.to(tl.int32), 0) > 0:
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        grad = load_rows(grad_pointer, rows, valid, head, grad_stride_t, grad_stride_h, DIM, BD)
        lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
        first = tl.zeros([BM], tl.int32) + start
        dq = query_gradient(q, grad, lse, delta, k_pointer, v_pointer, head // group, start, tl.max(last, 0), first,
                            last, scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD,
                            PRECISION)  # fmt: skip
        if columns > 1:
            dq += load_rows(acc_pointer, rows, valid, head, heads * DIM, DIM, DIM, BD)
        store_rows(dq_pointer, dq * scale, rows, valid, head, heads * DIM, DIM, DIM, BD)


@on_its_device
def attend_triton_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    layout: BlockLayout,
    causal: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, D], k and v [S, Hkv, D]."""
    q, k, v, grad_out = (last_contiguous(x) for x in (q, k, v, grad_out))
    routes = with_own_column(routes, layout)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    key_tiles = choose_key_tiles(dim, q.dtype, layout.block_size) if tiles is None else tiles
    tiles = choose_tiles(dim, q.dtype, layout.block_size) if tiles is None else tiles
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    make = torch.empty if layout.spans is None else torch.zeros  # given spans may leave keys out
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if tokens == 0:
        return dq, dk.zero_(), dv.zero_()
    columns, heads_per_row = routes.shape[2], heads // routes.shape[1]
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
    index = build_index(routes, layout.num_blocks, tiles.rows)
    own = find_own_places(layout, tiles.rows)
    parts = triton.cdiv(layout.block_size, key_tiles.keys)
    key_gradient_kernel[(layout.num_blocks * parts, kv_heads)](
        q, k, v, grad_out, lse, delta, dk, dv, routes, index.rows, index.first, own.blocks, tokens, heads, kv_heads,
        heads_per_row, columns, layout.num_blocks, parts, scale, *strides, dim,
        key_tiles.rows, key_tiles.keys, *shape[3:], causal, num_warps=key_tiles.warps, num_stages=key_tiles.stages,
    )  # fmt: skip
    acc = torch.zeros(q.shape if columns > 1 else (0,), dtype=torch.float32, device=q.device)
    num_tiles = index.tile_block.shape[2]
    for column in range(columns - 1):
        routed_query_gradient_kernel[(num_tiles, heads)](
            q, k, v, grad_out, lse, delta, acc, *index, own.blocks, column, tokens, heads, heads // kv_heads,
            heads_per_row, layout.num_blocks, num_tiles, scale, *strides, *shape, **launch,
        )  # fmt: skip
    own_query_gradient_kernel[(len(own.tiles), heads)](
        q, k, v, grad_out, lse, delta, acc, dq, routes, own.tiles, heads, heads // kv_heads, heads_per_row, columns,
        scale, *strides, causal, dim, own.rows, *shape[2:], **launch,
    )  # fmt: skip
    return dq, dk, dv
