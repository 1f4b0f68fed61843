# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton forward pass of MoBA: routed blocks column by column into float32 sums, then the own blocks and the result.

Each column of the routing is one launch over tiles of queries that chose the same block; a tile loads its queries by
the index, runs FlashAttention (Dao, arXiv 2307.08691) over the keys of that block, and merges into its rows' running
output. No query stands twice in a column, so no two programs of a launch touch the same row.

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
    attend_keys,
    choose_tiles,
    kernel,
    last_contiguous,
    load_rows,
    merge,
    on_its_device,
    padded,
    store_rows,
    with_own_column,
)
from neomoba_dist.model.attention.kernels.triton.index import build_index
from neomoba_dist.model.attention.kernels.triton.layout import find_own_places


@triton.jit
def list_tile(rows_pointer, first_pointer, tile_block_pointer, first_tile_pointer, list_row, tile, tokens, num_blocks,
              num_tiles, BM: tl.constexpr):  # fmt: skip
    """(block, query numbers [BM], which of them exist) of one tile of a list; num_blocks stands past the last tile."""
    block = tl.load(tile_block_pointer + list_row * num_tiles + tile)
    cell = list_row * (num_blocks + 1) + tl.minimum(block, num_blocks - 1)
    place = tl.load(first_pointer + cell) + (tile - tl.load(first_tile_pointer + cell)) * BM + tl.arange(0, BM)
    valid = place < tl.load(first_pointer + cell + 1)  # nothing for a tile past the last one
    rows = tl.load(rows_pointer + list_row.to(tl.int64) * tokens + place, mask=valid, other=0)
    return block, rows, valid


@triton.jit
def own_tile(tiles_pointer, routes_pointer, list_rows, list_head, columns, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """(query numbers [BM], which exist, first key of their own block, where each one's own keys end) of this program.

    A query whose routing does not name its own block has no own keys.
    """
    tile = tiles_pointer + tl.program_id(0) * 5
    rows = tl.load(tile) + tl.arange(0, BM)
    valid = rows < tl.load(tile + 1)
    route = routes_pointer + (rows.to(tl.int64) * list_rows + list_head) * columns
    own = valid & (tl.load(route, mask=valid, other=-1) >= 0)
    last = tl.zeros([BM], tl.int32) + tl.load(tile + 3)
    if CAUSAL:
        last = tl.minimum(last, rows + tl.load(tile + 4) + 1)
    return rows, valid, tl.load(tile + 2), tl.where(own, last, 0)


@kernel
def routed_forward_kernel(
    q_pointer, k_pointer, v_pointer, acc_pointer, lse_pointer, rows_pointer, first_pointer, tile_block_pointer,
    first_tile_pointer, blocks_pointer, column, tokens, heads, group, heads_per_row, num_blocks, num_tiles,
    scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one column's routed blocks to acc float32 [T, Hq, DIM] and lse float32 [T, Hq] (powers of two)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    list_row = column * (heads // heads_per_row) + head // heads_per_row
    block, rows, valid = list_tile(rows_pointer, first_pointer, tile_block_pointer, first_tile_pointer, list_row, tile,
                                   tokens, num_blocks, num_tiles, BM)  # fmt: skip
    if block < num_blocks:
        start = tl.load(blocks_pointer + block * 5)
        stop = start + tl.load(blocks_pointer + block * 5 + 1)
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        first, last = tl.zeros([BM], tl.int32) + start, tl.zeros([BM], tl.int32) + stop
        out, lse = attend_keys(q, k_pointer, v_pointer, head // group, start, stop, first, last, scale * LOG2E,
                               k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD, PRECISION)  # fmt: skip
        lse_rows = lse_pointer + rows.to(tl.int64) * heads + head
        before = tl.load(lse_rows, mask=valid, other=float("-inf"))
        known = valid & (before > float("-inf"))  # rows met for the first time hold no sums yet
        acc = load_rows(acc_pointer, rows, known, head, heads * DIM, DIM, DIM, BD)
        acc, lse = merge(acc, before, out, lse)
        store_rows(acc_pointer, acc, rows, valid, head, heads * DIM, DIM, DIM, BD)
        tl.store(lse_rows, lse, mask=valid)


@kernel
def own_forward_kernel(
    q_pointer, k_pointer, v_pointer, acc_pointer, lse_pointer, out_pointer, routes_pointer, tiles_pointer, heads, group,
    heads_per_row, columns, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the own blocks, merge with the routed sums, write out [T, Hq, DIM] and the natural lse in place."""
    head = tl.program_id(1)
    rows, valid, start, last = own_tile(tiles_pointer, routes_pointer, heads // heads_per_row, head // heads_per_row,
                                        columns, CAUSAL, BM)  # fmt: skip
    if tl.max(valid.to(tl.int32), 0) > 0:
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        first = tl.zeros([BM], tl.int32) + start
        out, lse = attend_keys(q, k_pointer, v_pointer, head // group, start, tl.max(last, 0), first, last,
                               scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD,
                               PRECISION)  # fmt: skip
        lse_rows = lse_pointer + rows.to(tl.int64) * heads + head
        before = tl.load(lse_rows, mask=valid, other=float("-inf"))
        acc = load_rows(acc_pointer, rows, valid & (before > float("-inf")), head, heads * DIM, DIM, DIM, BD)
        out, lse = merge(acc, before, out, lse)
        store_rows(out_pointer, out, rows, valid, head, heads * DIM, DIM, DIM, BD)
        tl.store(lse_rows, lse / LOG2E, mask=valid)


@on_its_device
def attend_triton(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, layout: BlockLayout, causal: bool, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp float32 [T, Hq]; see moba.attend."""
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    routes = with_own_column(routes, layout)
    tokens, heads, dim = q.shape
    tiles = choose_tiles(dim, q.dtype, layout.block_size) if tiles is None else tiles
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    columns, group, heads_per_row = routes.shape[2], heads // k.shape[1], heads // routes.shape[1]
    acc = torch.empty(q.shape if columns > 1 else (0,), dtype=torch.float32, device=q.device)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    shape = (dim, tiles.rows, tiles.keys, padded(dim), "ieee" if q.dtype == torch.float32 else "tf32")
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    own = find_own_places(layout, tiles.rows)
    if columns > 1:
        index = build_index(routes, layout.num_blocks, tiles.rows)
        num_tiles = index.tile_block.shape[2]
        for column in range(columns - 1):
            routed_forward_kernel[(num_tiles, heads)](
                q, k, v, acc, lse, *index, own.blocks, column, tokens, heads, group, heads_per_row,
                layout.num_blocks, num_tiles, dim**-0.5, *strides, *shape, **launch,
            )  # fmt: skip
    own_forward_kernel[(len(own.tiles), heads)](
        q, k, v, acc, lse, out, routes, own.tiles, heads, group, heads_per_row, columns, dim**-0.5, *strides, causal,
        dim, own.rows, *shape[2:], **launch,
    )  # fmt: skip
    return out, lse
