"""Context parallelism that moves queries: each goes to the ranks that hold the blocks it chose, MoBA's cheapest way
when ranks outnumber KV heads. Keys and values, and their gradients, never leave their rank.

A block that lies on two ranks is two pieces, each attended where it lies. A query head goes to a rank once, whatever
number of its blocks lie there. What travels forth is the query and the numbers of its pieces, and back the output over
them with its logsumexp; in the backward pass the gradient with two statistics, and back the query's gradient. Every
query's own piece is attended while the first of them travel forth.

Legend: S queries of this rank, Hq/Hkv query and KV heads, D head size, P pieces, C ranks; a row is a query head on its
way: M rows that are sent, N rows that are received.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neomoba_dist.model.attention.context.allgather import local_attention, select_local_blocks
from neomoba_dist.model.attention.context.merge import Exchange, Merged, SelectedSpans
from neomoba_dist.model.attention.kernels.layout import max_blocks
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.model.attention.moba import block_means
from neomoba_dist.parallel.comm import all_gather, all_to_all
from neomoba_dist.parallel.context_split import Pieces
from neomoba_dist.parallel.transfers import RowTransfer


class DispatchedQueries(torch.autograd.Function):
    """MoBA: q [S, Hq, D], k and v [S, Hkv, D], Exchange -> [S, Hq, D].

    Everything of a token's size that the backward pass needs is a saved tensor, so that activation checkpointing sees
    it. Received queries are kept if one round brought them all, else they travel again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> Tensor:
        everything = exchange.pieces
        block_indices = select_local_blocks(q, gather_means(k, everything, exchange), exchange)
        block_indices = block_indices.repeat_interleave(q.shape[1] // block_indices.shape[1], dim=1)
        chosen, spans = chosen_pieces(block_indices, everything, exchange), exchange.once(local_spans, k.shape[1])
        longest = int(everything.length.max())
        rounds = plan_dispatch(chosen, everything, k.shape[1], exchange)
        merged, travelling = Merged(q), rounds[0].send(q, exchange)
        merged.add(slice(None), *exchange.once(local_attention).forward(q, k, v))
        received_queries = q
        for dispatch, following in zip_longest(rounds, rounds[1:]):
            received_queries = travelling.wait()[:, None]
            here = SelectedSpans(dispatch.block_indices, spans, longest)
            out, lse = here.forward(received_queries, _heads_as_tokens(k), _heads_as_tokens(v))
            results = [dispatch.send_back(x, exchange) for x in (out, lse)]
            if following is not None:
                travelling = following.send(q, exchange)
            for rows, *part in zip(dispatch.rows(), *(dispatch.by_rank(x.wait()) for x in results), strict=True):
                merged.add(rows, part[0][:, 0], part[1][:, 0])
        result = merged.out.to(q.dtype)
        ctx.exchange, ctx.longest = exchange, longest
        kept = received_queries if len(rounds) == 1 else q
        ctx.save_for_backward(q, k, v, result, merged.lse, kept, spans, *(x for dispatch in rounds for x in dispatch))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, lse, kept, spans, *parts), exchange = ctx.saved_tensors, ctx.exchange
        rounds = [Dispatch(*parts[first : first + 4]) for first in range(0, len(parts), 4)]
        grad, dtype = grads[0].contiguous(), score_dtype(q.dtype)
        delta = (out.to(dtype) * grad.to(dtype)).sum(-1)
        sent = [grad, torch.stack((lse, delta), dim=2), *([q] if len(rounds) > 1 else [])]
        travelling = [rounds[0].send(x, exchange) for x in sent]
        dq, dk, dv = (x.to(dtype) for x in exchange.once(local_attention).backward(q, k, v, out, lse, grad))
        for dispatch, following in zip_longest(rounds, rounds[1:]):
            there, statistics, *again = (x.wait() for x in travelling)
            received_queries = again[0][:, None] if again else kept
            # delta stands for the output, which stays at home: the kernels take out . grad - grad_lse, so 0 + delta
            part_q, *part_kv = SelectedSpans(dispatch.block_indices, spans, ctx.longest).backward(
                received_queries,
                _heads_as_tokens(k),
                _heads_as_tokens(v),
                torch.zeros_like(received_queries),
                statistics[:, :1].contiguous(),
                there[:, None],
                grad_lse=-statistics[:, 1:].contiguous(),
            )
            result = dispatch.send_back(part_q, exchange)
            if following is not None:
                travelling = [following.send(x, exchange) for x in sent]
            for total, part in zip((dk, dv), part_kv, strict=True):
                total += part.view(k.shape[1], len(k), -1).transpose(0, 1)
            for rows, part in zip(dispatch.rows(), dispatch.by_rank(result.wait()), strict=True):
                dq[rows] += part[:, 0]
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
    size = max_blocks(exchange.split.num_tokens, exchange.moba.block_size, len(exchange.borders) - 1)
    means = own.new_zeros(size, *own.shape[1:])
    first, count = everything.first[:-1], everything.first.diff()
    for place in range(int(count.max())):  # a block has few pieces; one after the other, the sum has one order
        there = (count > place).nonzero()[:, 0]
        piece = (first[there] + place).to(k.device)
        means[there.to(k.device)] += pooled[piece] * share[piece, None, None]
    return means.to(k.dtype)


def chosen_pieces(block_indices: Tensor, everything: Pieces, exchange: Exchange) -> Tensor:
    """The pieces that every query head attends to beside its own one: int64 [S, Hq, columns], -1 for none.

    Of its current block a causal query sees the pieces before its own, of the others all.
    """
    device = block_indices.device
    first, start = everything.first.to(device), everything.start.to(device)
    own_piece = torch.searchsorted(start, exchange.split.global_index(exchange.rank, device), right=True) - 1
    block = block_indices.long().clamp(min=0)
    count = torch.where(block_indices >= 0, first[block + 1] - first[block], 0)
    most = int(everything.first.diff().max())
    piece = first[block][..., None] + torch.arange(most, device=device)
    seen = torch.arange(most, device=device) < count[..., None]
    own = own_piece[:, None, None]
    seen[:, :, 0] &= piece[:, :, 0] < own if exchange.causal else piece[:, :, 0] != own
    return piece.masked_fill(~seen, -1).flatten(2)


class Dispatch(NamedTuple):
    """Some query heads on their way to the ranks of their pieces. M of this rank leave, N of all ranks arrive.

    token, head: int64 [M], by destination. counts: int64 [2, C] on the CPU, rows that leave for and arrive from every
    rank. block_indices: int32 [N, 1, columns], pieces of this rank that each arrived row attends to (local_spans).
    """

    token: Tensor
    head: Tensor
    counts: Tensor
    block_indices: Tensor

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """What leaves for every rank: (token, head)."""
        sizes = self.counts[0].tolist()
        return list(zip(self.token.split(sizes), self.head.split(sizes), strict=True))

    def send(self, x: Tensor, exchange: Exchange) -> RowTransfer:
        """The travelling rows of x [S, Hq, ...] on their way to their destinations: [N, ...]."""
        leave, arrive = self.counts.tolist()
        return RowTransfer(x[self.token, self.head], exchange.mesh, exchange.axis, leave, arrive)

    def send_back(self, x: Tensor, exchange: Exchange) -> RowTransfer:
        """Results of the received rows [N, ...] on their way home: [M, ...]."""
        leave, arrive = self.counts.tolist()
        return RowTransfer(x, exchange.mesh, exchange.axis, arrive, leave)

    def by_rank(self, x: Tensor) -> tuple[Tensor, ...]:
        """What has come home [M, ...], by the rank that computed it."""
        return x.split(self.counts[0].tolist())


def plan_dispatch(chosen: Tensor, everything: Pieces, num_kv_heads: int, exchange: Exchange) -> list[Dispatch]:
    """Which queries go where, in as many rounds as keep what a rank receives within 1.5 times an even share.

    chosen: int64 [S, Hq, columns] from `chosen_pieces`. Where many queries choose the same blocks, their owner would
    otherwise hold queries of all T tokens.
    """
    device, ranks, axis = chosen.device, exchange.split.ranks, exchange.axis
    assert exchange.moba is not None
    owner = everything.owner.to(device)[chosen.clamp(min=0)].masked_fill(chosen < 0, -1)
    counts = torch.bincount(everything.owner, minlength=ranks).to(device)
    kv_head = torch.arange(chosen.shape[1], device=device) // (chosen.shape[1] // num_kv_heads)
    # the number of a piece among all heads' pieces of its owner
    number = everything.number.to(device)[chosen.clamp(min=0)] + kv_head[:, None] * counts[owner.clamp(min=0)]
    sent_rows, numbers, firsts = [], [], []
    for rank in range(ranks):
        there = owner == rank
        sent_rows.append(there.any(-1).nonzero(as_tuple=True))
        is_chosen = there[sent_rows[-1]]
        numbers.append(number[sent_rows[-1]][is_chosen])
        firsts.append(torch.nn.functional.pad(is_chosen.sum(-1).cumsum(0), (1, 0)))
    leaving = torch.tensor([len(token) for token, _ in sent_rows], device=device)
    table = all_gather(leaving, exchange.mesh, axis).tolist()
    limit = 1.5 * chosen.shape[0] * chosen.shape[1] * max(1, exchange.moba.top_k - 1)
    total = max(1, math.ceil(max(sum(column) for column in zip(*table, strict=True)) / limit))
    rounds = []
    for step in range(total):
        arrive = [row[exchange.rank] * (step + 1) // total - row[exchange.rank] * step // total for row in table]
        rows, streams = [], []
        for (token, head), listed, first in zip(sent_rows, numbers, firsts, strict=True):
            low, high = (len(token) * edge // total for edge in (step, step + 1))
            rows.append((token[low:high], head[low:high]))
            stream = listed[first[low] : first[high]] + 1
            last = first[low + 1 : high + 1] - first[low] - 1
            stream[last] = -stream[last]  # a row's last piece is marked by its sign: lists need no lengths of their own
            streams.append(stream)
        sizes = torch.tensor([len(stream) for stream in streams], device=device)[:, None]
        ones = [1] * ranks
        received = all_to_all(sizes, exchange.mesh, axis, ones, ones)[:, 0].tolist()
        sent = [len(stream) for stream in streams]
        arrived = all_to_all(torch.cat(streams).int(), exchange.mesh, axis, sent, received)
        token, head = (torch.cat(part) for part in zip(*rows, strict=True))
        rounds.append(Dispatch(token, head, torch.tensor([[len(t) for t, _ in rows], arrive]), _unpack(arrived)))
    return rounds


def local_spans(exchange: Exchange, num_kv_heads: int) -> Tensor:
    """Start and length of this rank's pieces, all KV heads laid end to end: int64 [Hkv * pieces, 2]."""
    everything = exchange.pieces
    mine = everything.of(exchange.rank)
    spans = torch.stack((everything.local[mine], everything.length[mine]), dim=1)
    heads = torch.arange(num_kv_heads)[:, None, None] * torch.tensor([exchange.split.local_tokens, 0])
    return (spans + heads).flatten(0, 1).to(exchange.device)


def _unpack(stream: Tensor) -> Tensor:
    """Lists of piece numbers, 1-based, the last of each negative -> int32 [N, 1, columns] 0-based, -1 for none."""
    is_last = stream < 0
    row = is_last.cumsum(0) - is_last.long()
    lengths = torch.bincount(row) if len(row) else row
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    column = torch.arange(len(stream), device=stream.device) - first[row]
    width = max(1, int(lengths.max())) if len(lengths) else 1
    block_indices = torch.full((len(lengths), width), -1, dtype=torch.int32, device=stream.device)
    block_indices[row, column] = stream.abs() - 1
    return block_indices[:, None]
