"""Context parallelism that moves queries: each goes to the ranks that hold the blocks it chose, MoBA's cheapest way
when ranks outnumber KV heads. Keys and values, and their gradients, never leave their rank.

A block that lies on two ranks is two pieces, each attended where it lies. A query head visits a rank once, whatever
number of its blocks lie there. What travels forth is the query and the numbers of its pieces, and back the output over
them with its logsumexp; in the backward pass the gradient with two statistics, and back the query's gradient.

Legend: S queries of this rank, Hq/Hkv query and KV heads, D head size, P pieces, C ranks; a row is a query head on its
way: M rows that are sent, N rows that are received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.model.context_exchange import route_local, squares
from neomoba_dist.model.context_parts import Exchange, Merged, Routes
from neomoba_dist.model.kernels.layout import max_blocks
from neomoba_dist.model.kernels.routing import score_dtype
from neomoba_dist.model.moba import block_means
from neomoba_dist.parallel.comm import all_gather, all_to_all
from neomoba_dist.parallel.context_split import Pieces


class RoutedQueries(torch.autograd.Function):
    """MoBA: q [S, Hq, D], k and v [S, Hkv, D], Exchange -> [S, Hq, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> Tensor:
        everything = exchange.pieces()
        routes = route_local(q, gather_means(k, everything, exchange), exchange)
        trip = Trip.plan(chosen_pieces(routes, everything, exchange), everything, k.shape[1], exchange)
        merged = Merged(q)
        merged.add(slice(None), *squares(exchange, q.device).forward(q, k, v))
        visitors = trip.send(q)
        out, lse = trip.routes.forward(visitors, _heads_as_tokens(k), _heads_as_tokens(v))
        for rows, part_out, part_lse in zip(trip.rows, trip.back(out), trip.back(lse), strict=True):
            merged.add(rows, part_out[:, 0], part_lse[:, 0])
        result = merged.out.to(q.dtype)
        ctx.exchange, ctx.trip = exchange, trip
        ctx.save_for_backward(q, k, v, result, merged.lse, visitors)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, lse, visitors), exchange, trip = ctx.saved_tensors, ctx.exchange, ctx.trip
        grad, dtype = grads[0].contiguous(), score_dtype(q.dtype)
        dq, dk, dv = (x.to(dtype) for x in squares(exchange, q.device).backward(q, k, v, out, lse, grad))
        delta = (out.to(dtype) * grad.to(dtype)).sum(-1)
        there, statistics = trip.send(grad), trip.send(torch.stack((lse, delta), dim=2))[:, 0]
        # delta stands for the output, which stays at home: the kernels take out . grad - grad_lse, so 0 + delta
        part_q, *part_kv = trip.routes.backward(
            visitors,
            _heads_as_tokens(k),
            _heads_as_tokens(v),
            torch.zeros_like(visitors),
            statistics[:, :1].contiguous(),
            there,
            grad_lse=-statistics[:, 1:].contiguous(),
        )
        for rows, part in zip(trip.rows, trip.back(part_q), strict=True):
            dq[rows] += part[:, 0]
        for total, part in zip((dk, dv), part_kv, strict=True):
            total += part.view(k.shape[1], len(k), -1).transpose(0, 1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _heads_as_tokens(x: Tensor) -> Tensor:
    """[S, Hkv, D] -> [Hkv * S, 1, D]: rows of different heads attend to different tokens of one head."""
    return x.transpose(0, 1).flatten(0, 1)[:, None]


def gather_means(k: Tensor, everything: Pieces, exchange: Exchange) -> Tensor:
    """The means of all blocks [N, Hkv, D] in the key dtype, from the means of everybody's pieces.

    A block on one rank has the same bits as in a single process. Those of several add up in their order, weighted by
    their lengths, in float32 (float64 for float64), and are rounded once.
    """
    assert exchange.moba is not None
    rank, dtype = exchange.rank, score_dtype(k.dtype)
    lengths = torch.nn.functional.pad(everything.length[everything.of(rank)].cumsum(0), (1, 0)).int()
    own = block_means(k.to(dtype), block_size=int(everything.length.max()), cu_seqlens=lengths.to(k.device))
    most = max(int((everything.owner == other).sum()) for other in range(exchange.split.ranks))
    sent = own.new_zeros(most, *own.shape[1:])
    sent[: len(lengths) - 1] = own[: len(lengths) - 1]
    gathered = all_gather(sent, exchange.mesh, exchange.axis)
    pooled = gathered[everything.owner.to(k.device), everything.number.to(k.device)]
    weight = torch.bincount(everything.block, everything.length.to(dtype), everything.num_blocks).to(dtype)
    share = (everything.length / weight[everything.block]).to(k.device)
    size = max_blocks(exchange.split.num_tokens, exchange.moba[0], len(exchange.borders) - 1)
    means = own.new_zeros(size, *own.shape[1:])
    first, count = everything.first[:-1], everything.first.diff()
    for place in range(int(count.max())):  # a block has few pieces; one after the other, the sum has one order
        there = (count > place).nonzero()[:, 0]
        piece = (first[there] + place).to(k.device)
        means[there.to(k.device)] += pooled[piece] * share[piece, None, None]
    return means.to(k.dtype)


def chosen_pieces(routes: Tensor, everything: Pieces, exchange: Exchange) -> Tensor:
    """The pieces that every query head attends to beside its own one: int64 [S, Hq, columns], -1 for none.

    Of its own block a causal query sees the pieces before its own, of the others all.
    """
    device = routes.device
    first, start = everything.first.to(device), everything.start.to(device)
    own_piece = torch.searchsorted(start, exchange.split.global_index(exchange.rank, device), right=True) - 1
    block = routes.long().clamp(min=0)
    count = torch.where(routes >= 0, first[block + 1] - first[block], 0)
    most = int(everything.first.diff().max())
    piece = first[block][..., None] + torch.arange(most, device=device)
    seen = torch.arange(most, device=device) < count[..., None]
    own = own_piece[:, None, None]
    seen[:, :, 0] &= piece[:, :, 0] < own if exchange.causal else piece[:, :, 0] != own
    return piece.masked_fill(~seen, -1).flatten(2)


@dataclass
class Trip:
    """Which query heads visit which ranks, and what they attend to there.

    rows: for every rank the (query, head) that this rank sends there; routes: of the received rows over this rank's
    pieces, all KV heads laid end to end.
    """

    exchange: Exchange
    rows: list[tuple[Tensor, Tensor]]
    send_counts: list[int]
    receive_counts: list[int]
    routes: Routes

    @classmethod
    def plan(cls, chosen: Tensor, everything: Pieces, num_kv_heads: int, exchange: Exchange) -> Trip:
        """chosen: int64 [S, Hq, columns] from `chosen_pieces`."""
        device, ranks, local = chosen.device, exchange.split.ranks, exchange.split.local_tokens
        owner = everything.owner.to(device)[chosen.clamp(min=0)].masked_fill(chosen < 0, -1)
        counts = torch.stack([(everything.owner == rank).sum() for rank in range(ranks)]).to(device)
        kv_head = torch.arange(chosen.shape[1], device=device) // (chosen.shape[1] // num_kv_heads)
        # the number of a piece among all heads' pieces of its owner
        number = everything.number.to(device)[chosen.clamp(min=0)] + kv_head[:, None] * counts[owner.clamp(min=0)]
        rows, numbers, ends = [], [], []
        for rank in range(ranks):
            there = owner == rank
            visits = there.any(-1).nonzero(as_tuple=True)
            rows.append((visits[0], visits[1]))
            wanted = there[visits]
            numbers.append(number[visits][wanted])
            ends.append(wanted.sum(-1))
        sizes = torch.tensor([[len(r[0]), len(n)] for r, n in zip(rows, numbers, strict=True)], device=device)
        ones = [1] * ranks
        received = all_to_all(sizes, exchange.mesh, exchange.axis, ones, ones).tolist()
        # a row's last piece is marked by its sign: the lists need no lengths of their own
        stream = torch.cat(numbers) + 1
        last = torch.cat(ends).cumsum(0) - 1
        stream[last] = -stream[last]
        arrived = all_to_all(
            stream.int(), exchange.mesh, exchange.axis, [len(n) for n in numbers], [n for _, n in received]
        )
        mine = everything.of(exchange.rank)
        spans = torch.stack((everything.local[mine], everything.length[mine]), dim=1)
        heads = torch.arange(num_kv_heads)[:, None, None] * torch.tensor([local, 0])
        routes = Routes(_unpack(arrived), (spans + heads).flatten(0, 1).to(device), int(everything.length.max()))
        return cls(exchange, rows, [len(r[0]) for r in rows], [n for n, _ in received], routes)

    def send(self, x: Tensor) -> Tensor:
        """The travelling rows of x [S, Hq, ...] at their destinations: [N, 1, ...]."""
        leaving = torch.cat([x[rows] for rows in self.rows])
        arguments = (self.exchange.mesh, self.exchange.axis, self.send_counts, self.receive_counts)
        return all_to_all(leaving, *arguments)[:, None]

    def back(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the received rows [N, ...] became, at home again, by the rank they had visited: [M, ...] each."""
        arguments = (self.exchange.mesh, self.exchange.axis, self.receive_counts, self.send_counts)
        return all_to_all(x, *arguments).split(self.send_counts)


def _unpack(stream: Tensor) -> Tensor:
    """Lists of piece numbers, 1-based, the last of each negative -> int32 [N, 1, columns] 0-based, -1 for none."""
    is_last = stream < 0
    row = is_last.cumsum(0) - is_last.long()
    lengths = torch.bincount(row) if len(row) else row
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    column = torch.arange(len(stream), device=stream.device) - first[row]
    width = max(1, int(lengths.max())) if len(lengths) else 1
    routes = torch.full((len(lengths), width), -1, dtype=torch.int32, device=stream.device)
    routes[row, column] = stream.abs() - 1
    return routes[:, None]
