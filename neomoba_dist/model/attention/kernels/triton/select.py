# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels of the gate: pool the keys of each block, then score and choose blocks without ever storing a score.

Same results as kernels/select.py up to the order of float32 sums; a tile's scores live in registers only.
Choice and tie rule are one comparison: the score's bits, made monotone, with the block index below them.

Legend: T queries, S keys, N blocks, R rows of the selection, BM queries, BN blocks or keys per tile, BD padded
head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import BlockLayout
from neomoba_dist.model.attention.kernels.select import POOLINGS, pooled_width, selection_shape
from neomoba_dist.model.attention.kernels.triton.common import (
    Tiles,
    choose_gate_tiles,
    kernel,
    last_contiguous,
    load_rows,
    on_its_device,
    padded,
)
from neomoba_dist.model.attention.kernels.triton.layout import block_span, describe_documents, document_of

MEAN: tl.constexpr = tl.constexpr(0)
MINMAX: tl.constexpr = tl.constexpr(2)
REPRESENTATIVE: tl.constexpr = tl.constexpr(3)
LOWEST: tl.constexpr = tl.constexpr(-(2**63))
HIGHEST: tl.constexpr = tl.constexpr(2**63 - 1)


@kernel
def pool_kernel(
    k_pointer,
    means_pointer,
    table,
    documents,
    block_size,
    stride_t,
    stride_h,
    num_kv_heads,
    POOLING: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One block of one KV head -> one row of means [N, Hkv, WIDTH], zero where the block does not exist."""
    block, head = tl.program_id(0), tl.program_id(1)
    _, start, length = block_span(table, documents, block, block_size)
    total = tl.zeros([BD], tl.float32)
    high = tl.full([BD], float("-inf"), tl.float32)
    low = tl.full([BD], float("inf"), tl.float32)
    damaged = tl.zeros([BD], tl.int32)
    for offset in range(0, length, BN):
        n = offset + tl.arange(0, BN)
        keys = load_rows(k_pointer, start + n, n < length, head, stride_t, stride_h, DIM, BD).to(tl.float32)
        inside = (n < length)[:, None]
        total += tl.sum(keys, 0)
        damaged += tl.sum((keys != keys).to(tl.int32), 0)  # tl.maximum drops what is not a number
        high = tl.maximum(high, tl.max(tl.where(inside, keys, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(inside, keys, float("inf")), 0))
    high = tl.where(damaged > 0, float("nan"), high)
    low = tl.where(damaged > 0, float("nan"), low)
    d = tl.arange(0, BD)
    row = means_pointer + (block * num_kv_heads + head) * WIDTH + d
    if POOLING == MEAN:
        pooled = total / tl.maximum(length, 1)
    elif POOLING == REPRESENTATIVE:
        last = k_pointer + (start + length - 1).to(tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h + d
        pooled = tl.load(last, mask=d < tl.where(length > 0, DIM, 0), other=0.0)
    else:
        pooled = tl.where(length > 0, high, 0.0)
    tl.store(row, pooled.to(means_pointer.dtype.element_ty), mask=d < DIM)
    if POOLING == MINMAX:
        low = tl.where(length > 0, low, 0.0)
        tl.store(row + DIM, low.to(means_pointer.dtype.element_ty), mask=d < DIM)


@on_its_device
def block_means_triton(k: Tensor, layout: BlockLayout, pooling: str) -> Tensor:
    """See moba.block_means."""
    k = last_contiguous(k)
    _, num_kv_heads, dim = k.shape
    width = pooled_width(dim, pooling)
    means = k.new_empty(layout.num_blocks, num_kv_heads, width)
    if means.numel():
        pool_kernel[(layout.num_blocks, num_kv_heads)](
            k, means, *describe_documents(layout), k.stride(0), k.stride(1), num_kv_heads, POOLINGS.index(pooling), dim,
            width, 64, padded(dim),
        )  # fmt: skip
    return means


@triton.jit
def gate_queries(
    q_pointer, rows, valid, row_head, group, stride_t, stride_h, SIGN: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr
):
    """Sum [rows, BD] over the `group` heads of one row of the selection; SIGN 1 or -1 keeps queries of one sign."""
    total = tl.zeros([rows.shape[0], BD], tl.float32)
    for member in range(group):
        q = load_rows(q_pointer, rows, valid, row_head * group + member, stride_t, stride_h, DIM, BD).to(tl.float32)
        if SIGN == 1:
            q = tl.maximum(q, 0.0)
        if SIGN == -1:
            q = tl.minimum(q, 0.0)
        total += q
    return total


@triton.jit
def sortable(scores, block):
    """int64 that order like (score, block): not-a-number and +inf first, -inf after every other number."""
    scores = tl.where(scores != scores, float("inf"), scores)
    scores = tl.maximum(scores, -3.4028234663852886e38)
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 equals 0.0
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | block.to(tl.int64)


@kernel
def gate_kernel(
    q_pointer,
    means_pointer,
    indices_pointer,
    table,
    documents,
    block_size,
    tokens,
    heads,
    columns,
    q_stride_t,
    q_stride_h,
    num_kv_heads,
    rows_per_kv_head,
    group,
    CAUSAL: tl.constexpr,
    IS_MINMAX: tl.constexpr,
    EXACT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """block_indices [T, R, columns] of BM queries; candidates are the blocks first..limit without the own one."""
    row_head = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = rows < tokens
    document = document_of(table, rows, documents)
    blocks = table + 3 * (documents + 1) + document
    first, last = tl.load(blocks), tl.load(blocks + 1)
    position = rows - tl.load(table + document) + tl.load(table + 2 * (documents + 1) + document)
    own = first + position // block_size
    own = tl.where(own < last, own, -1)
    limit = last
    if CAUSAL:  # a query whose current block has no keys here comes after all of its document's blocks
        limit = tl.where(own >= 0, own, last)
    indices_row = indices_pointer + (rows.to(tl.int64) * heads + row_head) * columns
    tl.store(indices_row, own, mask=valid)
    first = tl.where(valid, first, 2147483647)
    limit = tl.where(valid & (columns > 1), limit, 0)
    # A single half precision query is exact in its own dtype, a sum of them in float32 only.
    exact: tl.constexpr = tl.float32 if EXACT else means_pointer.dtype.element_ty
    SIGN: tl.constexpr = 1 if IS_MINMAX else 0
    q = gate_queries(q_pointer, rows, valid, row_head, group, q_stride_t, q_stride_h, SIGN, DIM, BD).to(exact)
    if IS_MINMAX:
        q_low = gate_queries(q_pointer, rows, valid, row_head, group, q_stride_t, q_stride_h, -1, DIM, BD).to(exact)
    kv_head = row_head // rows_per_kv_head
    slot = tl.arange(0, SLOTS)
    # Empty places hold distinct numbers below every score, places beyond the columns one above every score.
    top = tl.where(slot < columns - 1, LOWEST + slot.to(tl.int64), HIGHEST)[None, :] + tl.zeros([BM, SLOTS], tl.int64)
    for start in range(tl.min(first, 0), tl.max(limit, 0), BN):
        block = start + tl.arange(0, BN)
        exists = block < tl.max(limit, 0)
        stride = num_kv_heads * WIDTH
        high = load_rows(means_pointer, block, exists, kv_head, stride, WIDTH, DIM, BD).to(exact)
        scores = tl.dot(q, tl.trans(high), input_precision="ieee")
        if IS_MINMAX:
            low = load_rows(means_pointer + DIM, block, exists, kv_head, stride, WIDTH, DIM, BD).to(exact)
            scores += tl.dot(q_low, tl.trans(low), input_precision="ieee")
        candidate = (block[None, :] >= first[:, None]) & (block[None, :] < limit[:, None])
        candidate = candidate & (block[None, :] != own[:, None])
        ranked = tl.where(candidate, sortable(scores, block[None, :]), LOWEST)
        best, worst = tl.max(ranked, 1), tl.min(top, 1)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            better = best > worst
            top = tl.where((top == worst[:, None]) & better[:, None], best[:, None], top)
            ranked = tl.where(ranked == best[:, None], LOWEST, ranked)
            best, worst = tl.max(ranked, 1), tl.min(top, 1)
    top = tl.where(slot[None, :] < columns - 1, top, LOWEST)
    for column in range(1, columns):
        best = tl.max(top, 1)
        chosen = tl.where(best < LOWEST + SLOTS, -1, (best & 0x7FFFFFFF).to(tl.int32))
        tl.store(indices_row + column, chosen, mask=valid)
        top = tl.where(top == best[:, None], LOWEST, top)


@on_its_device
def select_blocks_triton(
    q: Tensor,
    means: Tensor,
    layout: BlockLayout,
    *,
    top_k: int,
    causal: bool,
    gate: str,
    pooling: str,
    tiles: Tiles | None = None,
) -> Tensor:
    """See moba.select_blocks."""
    shape = selection_shape(q, means, top_k, gate)
    block_indices = torch.empty(shape, dtype=torch.int32, device=q.device)  # the kernel writes every element
    tokens, heads, columns = block_indices.shape
    if tokens == 0:
        return block_indices
    q, means = last_contiguous(q), means.contiguous()
    num_kv_heads, width, dim = means.shape[1], means.shape[2], q.shape[2]
    group = q.shape[1] // num_kv_heads if gate == "kv_group" else 1
    exact = group > 1 or q.dtype == torch.float32
    tiles = choose_gate_tiles(dim, exact) if tiles is None else tiles
    gate_kernel[(triton.cdiv(tokens, tiles.rows), heads)](
        q, means, block_indices, *describe_documents(layout), tokens, heads, columns, q.stride(0), q.stride(1),
        num_kv_heads, heads // num_kv_heads, group, causal, pooling == "minmax", exact, dim, width,
        triton.next_power_of_2(max(1, columns - 1)), tiles.rows, tiles.keys, padded(dim),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return block_indices
