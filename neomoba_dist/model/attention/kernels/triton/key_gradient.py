# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels for the gradients of keys and values: deterministic, without atomics, unless they add up dq as well.

One program per part of a block and KV head walks the lists of queries that chose the block, then the queries whose
current block it is. Of a long list (everybody chooses the first block) it walks the first chunk alone: programs of a
launch before take a chunk each and leave float32 sums, which are added in the order of the chunks.

Where sums of dq are given, each program adds its keys' share of the gradients of its queries to them by atomics, in
whatever order programs come: with the five products per pair of FlashAttention's backward pass (arXiv 2307.08691).

Legend: T queries, S keys, Hq/Hkv query and KV heads, R rows of the selection, N blocks, BM queries, BN keys per tile,
BT blocks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.triton.common import LOG2E, Tiles, kernel, load_rows, padded, store_rows
from neomoba_dist.model.attention.kernels.triton.index import BlockIndex

BT = 64
LEAST_CHUNK, MOST_CHUNKS = 8192, 16  # queries; chunks beyond the first ones of all lists of a row


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
def add_query_gradients(
    dq_sums_pointer, k, slope, rows, valid, heads, head, DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr
):
    """Add the share of keys [BN, BD] to the sums of dq of the queries that count. slope: [BN, BM], in k's dtype."""
    d = tl.arange(0, BD)
    # as dq^T, because tensor cores of Hopper take 64 rows or more: of those BD has enough, BM may not
    dq = tl.trans(tl.dot(tl.trans(k), slope, input_precision=PRECISION))
    cells = dq_sums_pointer + (rows.to(tl.int64) * heads + head)[:, None] * DIM + d[None, :]
    tl.atomic_add(cells, dq, mask=valid[:, None] & (d < DIM)[None, :], sem="relaxed")


@triton.jit
def add_key_gradients(
    dk, dv, k, v, inside, rows, valid, visible, q_pointer, grad_pointer, lse_pointer, delta_pointer, dq_sums_pointer,
    heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of some queries to dk and dv [BN, BD], and the keys' share to the sums of dq where given.

    inside: which keys exist. valid: which queries count. visible: the keys that each sees; None: all, and every row can
    be read.
    """
    there = None if visible is None else valid
    q = load_rows(q_pointer, rows, there, head, q_stride_t, q_stride_h, DIM, BD)
    grad = load_rows(grad_pointer, rows, there, head, grad_stride_t, grad_stride_h, DIM, BD)
    lse, delta = load_statistics(lse_pointer, delta_pointer, rows, valid, heads, head)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.exp2(logits - lse[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    if dq_sums_pointer is not None:
        # keys that do not exist are zeros, but their weights, those of logits of 0, may be infinite
        weights = tl.where(inside[:, None], weights, 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    slope = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    slope = slope.to(q.dtype)
    dk = tl.dot(slope, q, dk, input_precision=PRECISION)
    if dq_sums_pointer is not None:
        add_query_gradients(dq_sums_pointer, k, slope, rows, valid, heads, head, DIM, BD, PRECISION)
    return dk, dv


@triton.jit
def further_chunks(first_pointer, block, num_blocks, chunk):
    """How many chunks the lists of some blocks have beyond the first; a block past the last has none."""
    inside = block < num_blocks
    begin = tl.load(first_pointer + block, mask=inside, other=0)
    end = tl.load(first_pointer + block + 1, mask=inside, other=0)
    return tl.maximum((end - begin + chunk - 1) // chunk - 1, 0)


@triton.jit
def find_chunk(first_pointer, num_blocks, chunk, BT: tl.constexpr):
    """(block, number of the chunk in its list) of this program's further chunk of a row; block -1: there is none."""
    here = tl.program_id(0)
    block, number, seen = -1, 0, 0
    for start in range(0, num_blocks, BT):
        index = start + tl.arange(0, BT)
        further = further_chunks(first_pointer, index, num_blocks, chunk)
        begin = seen + tl.cumsum(further, 0) - further
        mine = (begin <= here) & (here < begin + further)
        block += tl.sum(tl.where(mine, index + 1, 0), 0)
        number += tl.sum(tl.where(mine, here - begin + 1, 0), 0)
        seen += tl.sum(further, 0)
    return block, number


@triton.jit
def add_list(
    dk, dv, k, v, inside, entries, begin, end, q_pointer, grad_pointer, lse_pointer, delta_pointer, dq_sums_pointer,
    heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries begin..end of a list."""
    for place in range(begin, end, BM):
        at = place + tl.arange(0, BM)
        # past the end stands the last query again, with weights of 0: nothing else needs a mask
        rows = tl.load(entries + tl.minimum(at, end - 1))
        dk, dv = add_key_gradients(
            dk, dv, k, v, inside, rows, at < end, None, q_pointer, grad_pointer, lse_pointer, delta_pointer,
            dq_sums_pointer, heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD,
            PRECISION,
        )  # fmt: skip
    return dk, dv


@kernel
def long_list_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, dq_sums_pointer, dk_sums_pointer,
    dv_sums_pointer, queries_pointer, first_pointer, blocks_pointer, heads, kv_heads, heads_per_row, num_blocks, places,
    chunk, chunks, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, grad_stride_t,
    grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """float32 sums [R, chunks, parts, BN, DIM] for dk, still without 1 / sqrt(DIM), and dv of one further chunk."""
    part, list_row = tl.program_id(1), tl.program_id(2)
    first = first_pointer + list_row * (num_blocks + 1)
    block, number = find_chunk(first, num_blocks, chunk, BT)
    if block >= 0:
        start, length = tl.load(blocks_pointer + block * 5), tl.load(blocks_pointer + block * 5 + 1)
        n = start + part * BN + tl.arange(0, BN)
        inside = n < start + length
        kv_head = list_row * heads_per_row // (heads // kv_heads)
        k = load_rows(k_pointer, n, inside, kv_head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, inside, kv_head, v_stride_t, v_stride_h, DIM, BD)
        dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
        begin = tl.load(first + block) + number * chunk
        end = tl.minimum(begin + chunk, tl.load(first + block + 1))
        for member in range(heads_per_row):
            dk, dv = add_list(
                dk, dv, k, v, inside, queries_pointer + list_row.to(tl.int64) * places, begin, end, q_pointer,
                grad_pointer, lse_pointer, delta_pointer, dq_sums_pointer, heads, list_row * heads_per_row + member,
                scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BM, BD, PRECISION,
            )  # fmt: skip
        row = ((list_row.to(tl.int64) * chunks + tl.program_id(0)) * tl.num_programs(1) + part) * BN + tl.arange(0, BN)
        store_rows(dk_sums_pointer, dk, row, inside, 0, DIM, 0, DIM, BD)
        store_rows(dv_sums_pointer, dv, row, inside, 0, DIM, 0, DIM, BD)


@triton.jit
def add_sums(
    dk, dv, dk_sums_pointer, dv_sums_pointer, first_pointer, list_row, block, part, parts, inside, num_blocks, chunk,
    chunks, DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add what long_list_kernel found of one block and list."""
    further = further_chunks(first_pointer, block, num_blocks, chunk)
    if further > 0:
        before = 0
        for start in range(0, block, BT):
            index = start + tl.arange(0, BT)
            others = further_chunks(first_pointer, index, num_blocks, chunk)
            before += tl.sum(tl.where(index < block, others, 0), 0)
        for number in range(before, before + further):
            row = ((list_row.to(tl.int64) * chunks + number) * parts + part) * BN + tl.arange(0, BN)
            dk += load_rows(dk_sums_pointer, row, inside, 0, DIM, 0, DIM, BD)
            dv += load_rows(dv_sums_pointer, row, inside, 0, DIM, 0, DIM, BD)
    return dk, dv


@kernel
def key_gradient_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, dk_pointer, dv_pointer, dq_sums_pointer,
    dk_sums_pointer, dv_sums_pointer, indices_pointer, queries_pointer, first_pointer, blocks_pointer, heads, kv_heads,
    heads_per_row, columns, num_blocks, places, parts, chunk, chunks, scale, q_stride_t, q_stride_h, k_stride_t,
    k_stride_h, v_stride_t, v_stride_h, grad_stride_t, grad_stride_h, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dk and dv [S, Hkv, DIM] of BN keys of one block, and their share of dq, without 1 / sqrt(DIM).

    dq_sums_pointer: float32 [T, Hq, DIM] or None. dk_sums_pointer: None where no list can be long.
    """
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
        dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
        if dk_sums_pointer is not None:
            for row in range(list_rows // kv_heads):
                list_row = kv_head * (list_rows // kv_heads) + row
                first = first_pointer + list_row * (num_blocks + 1)
                dk, dv = add_sums(
                    dk, dv, dk_sums_pointer, dv_sums_pointer, first, list_row, block, part, parts, inside, num_blocks,
                    chunk, chunks, DIM, BN, BD, BT,
                )  # fmt: skip
        k = load_rows(k_pointer, n, inside, kv_head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, inside, kv_head, v_stride_t, v_stride_h, DIM, BD)
        if CAUSAL:  # queries before the first key of this part see none of it
            own_begin += tl.maximum(part * BN - own_place, 0)
        for member in range(group):
            head = kv_head * group + member
            list_row = head // heads_per_row
            cell = first_pointer + list_row * (num_blocks + 1) + block
            begin, end = 0, 0
            if columns > 1:
                begin, end = tl.load(cell), tl.load(cell + 1)
            end = tl.minimum(end, begin + chunk)
            dk, dv = add_list(
                dk, dv, k, v, inside, queries_pointer + list_row.to(tl.int64) * places, begin, end, q_pointer,
                grad_pointer, lse_pointer, delta_pointer, dq_sums_pointer, heads, head, scale, q_stride_t, q_stride_h,
                grad_stride_t, grad_stride_h, DIM, BM, BD, PRECISION,
            )  # fmt: skip
            for place in range(own_begin, own_end, BM):
                rows = place + tl.arange(0, BM)
                valid = current_queries(indices_pointer, rows, own_end, list_rows, list_row, columns)
                visible = valid[None, :]
                if CAUSAL:
                    visible &= n[:, None] <= (rows + shift)[None, :]
                dk, dv = add_key_gradients(
                    dk, dv, k, v, inside, rows, valid, visible, q_pointer, grad_pointer, lse_pointer, delta_pointer,
                    dq_sums_pointer, heads, head, scale, q_stride_t, q_stride_h, grad_stride_t, grad_stride_h, DIM, BD,
                    PRECISION,
                )  # fmt: skip
        store_rows(dk_pointer, dk * scale, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)
        store_rows(dv_pointer, dv, n, inside, kv_head, kv_heads * DIM, DIM, DIM, BD)


@triton.jit
def current_queries(indices_pointer, rows, end, list_rows, list_row, columns):
    """Which of the queries stand before `end` and chose their current block."""
    chosen = indices_pointer + (rows.to(tl.int64) * list_rows + list_row) * columns
    return (rows < end) & (tl.load(chosen, mask=rows < end, other=-1) >= 0)


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    dq_sums: Tensor | None,
    block_indices: Tensor,
    index: BlockIndex,
    blocks: Tensor,
    causal: bool,
    block_size: int,
    tiles: Tiles,
    chunk: int | None = None,
) -> None:
    """Write dk and dv [S, Hkv, D] in one launch, or two where a list can be longer than a chunk.

    dq_sums: float32 [T, Hq, D]; where given, dq * sqrt(D) is added to it.
    chunk: queries; None: so many that the sums of all chunks stay below MOST_CHUNKS blocks per row of the selection.
    """
    (tokens, heads, dim), kv_heads, (_, list_rows, columns) = q.shape, k.shape[1], block_indices.shape
    places, num_blocks = index.queries.shape[1], len(blocks)
    chunk = max(LEAST_CHUNK, triton.cdiv(places, MOST_CHUNKS)) if chunk is None else chunk
    chunks = places // chunk if tokens > chunk else 0  # a query stands at most once in a list
    parts = triton.cdiv(block_size, tiles.keys)
    shape = (dim, tiles.rows, tiles.keys, padded(dim), "ieee" if q.dtype == torch.float32 else "tf32")
    strides = [stride for x in (q, k, v, grad_out) for stride in (x.stride(0), x.stride(1))]
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    dk_sums = dv_sums = None
    if chunks:
        sums = (list_rows, chunks, parts, tiles.keys, dim)
        dk_sums, dv_sums = (torch.empty(sums, dtype=torch.float32, device=q.device) for _ in range(2))
        long_list_kernel[(chunks, parts, list_rows)](
            q, k, v, grad_out, lse, delta, dq_sums, dk_sums, dv_sums, index.queries, index.first, blocks, heads,
            kv_heads, heads // list_rows, num_blocks, places, chunk, chunks, dim**-0.5, *strides, *shape, BT, **launch,
        )  # fmt: skip
    key_gradient_kernel[(num_blocks * parts, kv_heads)](
        q, k, v, grad_out, lse, delta, dk, dv, dq_sums, dk_sums, dv_sums, block_indices, index.queries, index.first,
        blocks, heads, kv_heads, heads // list_rows, columns, num_blocks, places, parts, chunk, chunks, dim**-0.5,
        *strides, *shape, causal, BT, **launch,
    )  # fmt: skip
