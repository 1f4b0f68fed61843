# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton forward pass of MoBA: chosen blocks list by list, then the current blocks, merged with what was found.

A program of the first launch takes a tile of queries that chose the same block, loads them by the index, runs
FlashAttention (Dao, arXiv 2307.08691) over the keys of that block, and writes its result at the tile's places.
The second launch attends to the current blocks and merges the parts of each query, found through `BlockIndex.slots`.

Legend: T queries, S keys, Hq/Hkv query and KV heads, R rows of the selection, C columns of other blocks, N blocks, BM
queries, BN keys per tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.groups import head_groups
from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.triton.common import (
    LOG2E,
    Tiles,
    attend_keys,
    kernel,
    last_contiguous,
    load_rows,
    merge,
    on_its_device,
    padded,
    store_rows,
    tiles_of,
    with_current_column,
)
from neomoba_dist.model.attention.kernels.triton.index import build_index, index_shape
from neomoba_dist.model.attention.kernels.triton.layout import find_current_blocks


@triton.jit
def list_tile(tiles_pointer, queries_pointer, list_row, places, num_tiles, BM: tl.constexpr):
    """(number of queries, first and last key, places [BM], queries [BM], which exist) of this program's tile of a list.

    A tile past the last one has no queries.
    """
    tile = tiles_pointer + (list_row * num_tiles + tl.program_id(0)) * 4
    begin, end = tl.load(tile + 2), tl.load(tile + 3)
    place = begin + tl.arange(0, BM)
    valid = place < end
    rows = tl.load(queries_pointer + list_row.to(tl.int64) * places + place, mask=valid, other=0)
    return end - begin, tl.load(tile), tl.load(tile + 1), place, rows, valid


@triton.jit
def current_tile(tiles_pointer, indices_pointer, list_rows, list_head, columns, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """(queries [BM], which exist, first key of their current block, end of the keys that all see, of those each sees).

    A query whose selection does not name its current block has no keys there.
    """
    tile = tiles_pointer + tl.program_id(0) * 5
    rows = tl.load(tile) + tl.arange(0, BM)
    valid = rows < tl.load(tile + 1)
    chosen = indices_pointer + (rows.to(tl.int64) * list_rows + list_head) * columns
    own = valid & (tl.load(chosen, mask=valid, other=-1) >= 0)
    last = tl.zeros([BM], tl.int32) + tl.load(tile + 3)
    if CAUSAL:
        last = tl.minimum(last, rows + tl.load(tile + 4) + 1)
    last = tl.where(own, last, 0)
    seen_by_all = tl.min(tl.where(valid, last, 2147483647), 0)
    return rows, valid, tl.load(tile + 2), seen_by_all, last


@kernel
def selected_forward_kernel(
    q_pointer, k_pointer, v_pointer, k_tiles, v_tiles, part_pointer, lse_pointer, tiles_pointer, queries_pointer,
    first_head, group, heads_per_row, places, num_tiles, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts [H, places, DIM] and their logsumexp float32 [H, places] (powers of two) of the chosen blocks, for the H
    heads from first_head on."""
    head = first_head + tl.program_id(1)
    count, start, stop, place, rows, valid = list_tile(tiles_pointer, queries_pointer, head // heads_per_row, places,
                                                       num_tiles, BM)  # fmt: skip
    if count > 0:
        # rows that do not exist compute something of query 0, which is not stored
        q = load_rows(q_pointer, rows, None, head, q_stride_t, q_stride_h, DIM, BD)
        out, lse = attend_keys(q, k_pointer, v_pointer, k_tiles, v_tiles, head // group, start, stop, stop, None,
                               scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h, DIM, BM, BN, BD,
                               PRECISION)  # fmt: skip
        at = tl.cast(tl.program_id(1), tl.int64) * places + place
        store_rows(part_pointer, out, at, valid, 0, DIM, 0, DIM, BD)
        tl.store(lse_pointer + at, lse, mask=valid)


@kernel
def current_forward_kernel(
    q_pointer, k_pointer, v_pointer, part_pointer, part_lse_pointer, slots_pointer, out_pointer, lse_pointer,
    indices_pointer, tiles_pointer, first_head, heads, group, heads_per_row, columns, places, scale, q_stride_t,
    q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, CAUSAL: tl.constexpr, DIM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the current blocks, merge with the parts, write out [T, Hq, DIM] and the natural lse [T, Hq] of the
    heads from first_head on."""
    head = first_head + tl.program_id(1)
    list_rows, list_head = heads // heads_per_row, head // heads_per_row
    rows, valid, start, seen_by_all, last = current_tile(tiles_pointer, indices_pointer, list_rows, list_head, columns,
                                                     CAUSAL, BM)  # fmt: skip
    if tl.max(valid.to(tl.int32), 0) > 0:
        q = load_rows(q_pointer, rows, valid, head, q_stride_t, q_stride_h, DIM, BD)
        out, lse = attend_keys(q, k_pointer, v_pointer, None, None, head // group, start, seen_by_all,
                               tl.max(last, 0), last, scale * LOG2E, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
                               DIM, BM, BN, BD, PRECISION)  # fmt: skip
        for column in range(columns - 1):
            slot = slots_pointer + (rows.to(tl.int64) * list_rows + list_head) * (columns - 1) + column
            place = tl.load(slot, mask=valid, other=-1)
            there = place >= 0
            at = tl.cast(tl.program_id(1), tl.int64) * places + place
            part = load_rows(part_pointer, at, there, 0, DIM, 0, DIM, BD).to(tl.float32)
            out, lse = merge(part, tl.load(part_lse_pointer + at, mask=there, other=float("-inf")), out, lse)
        store_rows(out_pointer, out, rows, valid, head, heads * DIM, DIM, DIM, BD)
        tl.store(lse_pointer + rows.to(tl.int64) * heads + head, lse / LOG2E, mask=valid)


def whole_tiles(x: Tensor, tiles: Tiles) -> Any:
    """A descriptor of x [S, Hkv, D] in tiles [keys, 1, D], None where loads go by pointers.

    The hardware asks for a start and strides of whole 16 bytes; D must be a power of two, as a tile of Triton is.
    """
    tokens_stride, heads_stride, _ = x.stride()
    aligned = all(value * x.element_size() % 16 == 0 for value in (tokens_stride, heads_stride))
    if not (tiles.descriptors and aligned and x.data_ptr() % 16 == 0 and x.shape[2] == padded(x.shape[2])):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tiles.keys, 1, x.shape[2]])


def index_length(problem: Problem) -> int:
    """Elements of the third result of `attend_triton`."""
    block_indices = with_current_column(problem)
    return index_shape(block_indices, problem.layout.num_blocks, tiles_of(problem).rows).length()


@on_its_device
def attend_triton(problem: Problem, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, Hq, D], logsumexp float32 [T, Hq] (see moba.attend), and the index, which backward uses again."""
    layout, causal = problem.layout, problem.causal
    q, k, v = (last_contiguous(x) for x in (problem.q, problem.k, problem.v))
    block_indices = with_current_column(problem)
    tokens, heads, dim = q.shape
    tiles = tiles_of(problem) if tiles is None else tiles
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    indexed = index_shape(block_indices, layout.num_blocks, tiles.rows)
    if tokens == 0:
        return out, lse, block_indices.new_empty(indexed.length())
    columns, group, heads_per_row = block_indices.shape[2], heads // k.shape[1], heads // block_indices.shape[1]
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    shape = (dim, tiles.rows, tiles.keys, padded(dim), "ieee" if q.dtype == torch.float32 else "tf32")
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    own = find_current_blocks(layout, tiles.rows)
    buffer = build_index(block_indices, own.blocks, tiles.rows)
    index = indexed.view(buffer)
    places, num_tiles = index.queries.shape[1], index.tiles.shape[1]
    together = heads // head_groups(q, heads, places * (dim * q.element_size() + 4))
    parts = torch.empty(together, places, dim, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(together, places, dtype=torch.float32, device=q.device)
    by_tiles = (whole_tiles(k, tiles), whole_tiles(v, tiles))
    by_tiles = by_tiles if None not in by_tiles else (None, None)
    for first_head in range(0, heads, together):
        if columns > 1:
            selected_forward_kernel[(num_tiles, together)](
                q, k, v, *by_tiles, parts, part_lse, index.tiles, index.queries, first_head, group, heads_per_row,
                places, num_tiles, dim**-0.5, *strides, *shape, **launch,
            )  # fmt: skip
        current_forward_kernel[(len(own.tiles), together)](
            q, k, v, parts, part_lse, index.slots, out, lse, block_indices, own.tiles, first_head, heads, group,
            heads_per_row, columns, places, dim**-0.5, *strides, causal, dim, own.rows, *shape[2:], **launch,
        )  # fmt: skip
    return out, lse, buffer
