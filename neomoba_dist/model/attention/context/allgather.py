"""Context parallelism that moves keys and values: gathered whole, some heads at a time, or passed around a ring.

Legend: S tokens of this rank, T of all ranks, Hq/Hkv query and KV heads, h KV heads at a time, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.attention.context.merge import (
    Exchange,
    LocalAttention,
    Merged,
    Rectangle,
    SelectedSpans,
    add_rectangle_gradients,
    add_rectangles,
    zeros_like_all,
)
from neomoba_dist.model.attention.kernels.layout import PlacedBlocks, make_layout
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.model.attention.moba import Packing, block_means, select_blocks
from neomoba_dist.parallel.context import in_global_order, scatter_gradients
from neomoba_dist.parallel.transfers import UnderWay, pass_on, start_all_gather


def local_rows(exchange: Exchange, start: int, stop: int) -> slice:
    """Local indices of consecutive tokens of one unit."""
    first = exchange.split.tokens_before(exchange.rank, start)
    return slice(first, first + stop - start)


class QueryRange(NamedTuple):
    """Consecutive queries and the keys, of any rank, that they attend to outside their own segment: global indices."""

    start: int
    stop: int
    first_key: int
    last_key: int  # past the last one; the first key where there are none


def query_ranges(exchange: Exchange) -> list[QueryRange]:
    """This rank's queries with the keys of other segments, some with none.

    Causal MoBA: what stands of the current block before the unit. Full attention: what stands of the document before,
    and for a bidirectional model what stands after it.
    """
    found = []
    for segment in exchange.segments:
        if exchange.moba is None:
            found.append(QueryRange(segment.start, segment.stop, segment.document_start, segment.start))
            if not exchange.causal:
                found.append(QueryRange(segment.start, segment.stop, segment.stop, segment.document_stop))
            continue
        size = exchange.moba.block_size
        skipped = (segment.start - segment.document_start) // size * size
        first = range(segment.document_start + skipped, segment.stop, size)
        for block in first:
            start, stop = max(block, segment.start), min(block + size, segment.stop)
            found.append(QueryRange(start, stop, block, start))
    return found


def local_attention(exchange: Exchange) -> LocalAttention:
    """Of this rank's segments; for MoBA of their parts within one block."""
    starts = sorted({found.start for found in exchange.once(query_ranges)})
    firsts = [local_rows(exchange, start, start).start for start in starts]
    lengths = [b - a for a, b in zip(firsts, [*firsts[1:], exchange.split.local_tokens], strict=True)]
    return LocalAttention(lengths, exchange.causal, exchange.device)


class GatheredAttention(torch.autograd.Function):
    """q [S, Hq, D], k and v [S, Hkv, D], Exchange -> [S, Hq, D], with all-gathered keys and values, which travel while
    the rank computes with its own ones.

    As many KV heads at a time as make a gathered chunk no larger than this rank's own keys, but at least one: with more
    ranks than KV heads a chunk is one head of all T tokens. The backward pass gathers again, so nothing of length T is
    kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> Tensor:
        outs, statistics, selections = [], [], []
        own, rectangles = exchange.once(_own_parts)
        for heads, keys in _chunks(q, k, exchange):
            queries, own_k, own_v = q[:, heads], k[:, keys], v[:, keys]
            merged, gathering = Merged(queries), [_start_gather(x, exchange) for x in (own_k, own_v)]
            if own is not None:
                merged.add(slice(None), *own.forward(queries, own_k, own_v))
            all_k, all_v = (_gathered(x, exchange) for x in gathering)
            add_rectangles(merged, rectangles, queries, all_k, all_v)
            selected = _selected_blocks(queries, all_k, exchange)
            if selected is not None:
                merged.add(slice(None), *selected.forward(queries, all_k, all_v))
            selections.append(selected)
            outs.append(merged.out.to(q.dtype))
            statistics.append(merged.lse)
        out, lse = torch.cat(outs, dim=1), torch.cat(statistics, dim=1)
        ctx.exchange, ctx.longest = exchange, [None if one is None else one.longest for one in selections]
        # saved, not kept on ctx: activation checkpointing must see whatever grows with the tokens
        tensors = (x for one in selections if one is not None for x in (one.block_indices, one.spans))
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, lse, *saved), exchange = ctx.saved_tensors, ctx.exchange
        parts, tensors = [], iter(saved)
        own, rectangles = exchange.once(_own_parts)
        for (heads, keys), longest in zip(_chunks(q, k, exchange), ctx.longest, strict=True):
            selected = None if longest is None else SelectedSpans(next(tensors), next(tensors), longest)
            queries, own_k, own_v, grad = q[:, heads], k[:, keys], v[:, keys], grads[0][:, heads].contiguous()
            results = (out[:, heads].contiguous(), lse[:, heads].contiguous(), grad)
            gathering = [_start_gather(x, exchange) for x in (own_k, own_v)]
            own_grads = None if own is None else own.backward(queries, own_k, own_v, *results)
            all_k, all_v = (_gathered(x, exchange) for x in gathering)
            totals = zeros_like_all(queries, all_k, all_v)
            add_rectangle_gradients(totals, rectangles, queries, all_k, all_v, *results)
            if selected is not None:
                for total, part in zip(totals, selected.backward(queries, all_k, all_v, *results), strict=True):
                    total += part
            chunk = [totals[0], *(_scatter(x.to(q.dtype), exchange) for x in totals[1:])]
            if own_grads is not None:
                chunk = [a + b for a, b in zip(chunk, own_grads, strict=True)]
            parts.append([x.to(q.dtype) for x in chunk])
        dq, dk, dv = (torch.cat(chunks, dim=1) for chunks in zip(*parts, strict=True))
        return dq, dk, dv, None


def _chunks(q: Tensor, k: Tensor, exchange: Exchange) -> Iterator[tuple[slice, slice]]:
    """(query heads, KV heads) that are gathered at a time."""
    total, group = k.shape[1], q.shape[1] // k.shape[1]
    width = -(-total // exchange.split.ranks)
    for first in range(0, total, width):
        stop = min(first + width, total)
        yield slice(first * group, stop * group), slice(first, stop)


def _start_gather(x: Tensor, exchange: Exchange) -> UnderWay:
    return start_all_gather(x, exchange.mesh, exchange.axis)


def _gathered(x: UnderWay, exchange: Exchange) -> Tensor:
    return in_global_order(x.wait(), exchange.split)


def _scatter(grad: Tensor, exchange: Exchange) -> Tensor:
    return scatter_gradients(grad, exchange.mesh, exchange.axis, exchange.split)


def _own_parts(exchange: Exchange) -> tuple[LocalAttention | None, list[Rectangle]]:
    """LocalAttention, and rectangles against the gathered keys. A bidirectional MoBA query attends to its current block
    like to any other, and has neither."""
    if exchange.moba is not None and not exchange.causal:
        return None, []
    rectangles = [
        (local_rows(exchange, start, stop), slice(first, last))
        for start, stop, first, last in exchange.once(query_ranges)
        if last > first
    ]
    return exchange.once(local_attention), rectangles


def _selected_blocks(q: Tensor, all_k: Tensor, exchange: Exchange) -> SelectedSpans | None:
    """Which whole blocks of the gathered keys every query of this rank chose; its own one where nothing is masked."""
    if exchange.moba is None:
        return None
    size, cu = exchange.moba.block_size, exchange.cu_seqlens
    means = block_means(all_k, block_size=size, cu_seqlens=cu, pooling=exchange.moba.pooling, placed=exchange.placed)
    block_indices = select_local_blocks(q, means, exchange)
    block_indices = block_indices[:, :, 1:] if exchange.causal else block_indices
    if block_indices.shape[2] == 0:
        return None
    return SelectedSpans(block_indices.contiguous(), exchange.once(_block_spans), size)


def _block_spans(exchange: Exchange) -> Tensor:
    """Start and length of all blocks, int64 [N, 2]."""
    assert exchange.moba is not None
    tokens, cu = exchange.split.num_tokens, exchange.cu_seqlens
    layout = make_layout(tokens, tokens, exchange.moba.block_size, cu, cu, None, cu.device, exchange.placed)
    return torch.stack(layout.block_spans(), dim=1)


def select_local_blocks(q: Tensor, means: Tensor, exchange: Exchange) -> Tensor:
    """moba.select_blocks for this rank's queries, unit by unit: int32 [S, R, columns]. means: of all blocks."""
    assert exchange.moba is not None
    moba, split = exchange.moba, exchange.split
    options: dict[str, Any] = {"top_k": moba.top_k, "gate": moba.gate, "pooling": moba.pooling}
    options |= {"causal": exchange.causal, "num_keys": split.num_tokens}
    units = zip(q.split(split.unit), exchange.once(_unit_packings), strict=True)
    return torch.cat([select_blocks(queries, means, **options, **packing) for queries, packing in units])


def _unit_packings(exchange: Exchange) -> list[Packing]:
    """Where the queries of each of this rank's units and all keys lie."""
    assert exchange.moba is not None
    cu, split, size, device = exchange.cu_seqlens, exchange.split, exchange.moba.block_size, exchange.device
    found = []
    for start in split.unit_starts(exchange.rank):
        borders, offset = (cu - start).clamp(0, split.unit).int(), (start - cu[:-1]).clamp(min=0)
        table = make_layout(split.unit, split.num_tokens, size, borders, cu, offset, device).table
        placed = PlacedBlocks(table if device.type == "cpu" else table.int())
        found.append(Packing(block_size=size, cu_seqlens=borders, cu_seqlens_k=cu, q_offset=offset, placed=placed))
    return found


class RingAttention(torch.autograd.Function):
    """Full attention: q [S, Hq, D], k and v [S, Hkv, D], Exchange -> [S, Hq, D], keys passed from rank to rank.

    While a rank computes with one rank's keys, the next one's are on their way. Gradients of keys follow their keys
    one step behind, as sums in the dtype of the scores, and end at their owner.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> Tensor:
        merged, around = Merged(q), _around(k, v, exchange)
        rectangles, _ = next(around)  # from here on the first keys travel
        merged.add(slice(None), *exchange.once(local_attention).forward(q, k, v))
        add_rectangles(merged, rectangles, q, k, v)
        for rectangles, (keys, values) in around:
            add_rectangles(merged, rectangles, q, keys, values)
        out = merged.out.to(q.dtype)
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, v, out, merged.lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, lse), exchange = ctx.saved_tensors, ctx.exchange
        grad, dtype, travelling = grads[0].contiguous(), score_dtype(q.dtype), None
        around = _around(k, v, exchange)
        rectangles, _ = next(around)  # from here on the first keys travel
        dq, dk, dv = (x.to(dtype) for x in exchange.once(local_attention).backward(q, k, v, out, lse, grad))
        add_rectangle_gradients((dq, dk, dv), rectangles, q, k, v, out, lse, grad)
        for rectangles, (keys, values) in around:
            totals = (dq, *zeros_like_all(keys, values))
            add_rectangle_gradients(totals, rectangles, q, keys, values, out, lse, grad)
            part = list(totals[1:])
            if travelling is not None:
                part = [a + b for a, b in zip(travelling.wait(), part, strict=True)]
            travelling = pass_on(part, exchange.mesh, exchange.axis)
        if travelling is not None:
            dk, dv = (a + b for a, b in zip((dk, dv), travelling.wait(), strict=True))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _around(k: Tensor, v: Tensor, exchange: Exchange) -> Iterator[tuple[list[Rectangle], tuple[Tensor, Tensor]]]:
    """(rectangles against its keys, its keys and values) for every rank of the axis, this one's first."""
    ranks, ranges = exchange.split.ranks, exchange.once(query_ranges)
    for step in range(ranks):
        transfer = pass_on((k, v), exchange.mesh, exchange.axis) if step < ranks - 1 else None
        yield _ring_rectangles(exchange, ranges, (exchange.rank - step) % ranks), (k, v)
        if transfer is not None:
            k, v = transfer.wait()


def _ring_rectangles(exchange: Exchange, ranges: list[QueryRange], owner: int) -> list[Rectangle]:
    """Of `ranges`, the queries of this rank and the keys of the owner that they attend to, both as local indices.

    The keys of the queries' own segment are left out: they lie between the keys before and the keys after it.
    """
    split = exchange.split
    found = []
    for start, stop, first, last in ranges:
        keys = slice(*(split.tokens_before(owner, index) for index in (first, last)))
        if keys.stop > keys.start:
            found.append((local_rows(exchange, start, stop), keys))
    return found
