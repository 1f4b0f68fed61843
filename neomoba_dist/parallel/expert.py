"""Expert parallelism: every token travels to the ranks that hold its experts, and the results travel back.

A (token, expert) pair is one row. Rows are sorted by expert, so that one uneven all-to-all over ep brings each to the
rank of its expert (experts e * n / ep to (e + 1) * n / ep - 1 lie on member e), and one brings it back; how many rows
go where is exchanged once. With sequence parallelism every tp rank sends its own tokens only: the rows that arrive on
the tp ranks of one expert are gathered among them, and the partial results are summed on the way back.
Source: GShard (arXiv 2006.16668, section 3.2); dropless sorting as in MegaBlocks (arXiv 2211.15841).

Shape letters: S tokens of this rank, H hidden size, K experts per token, E experts, P rows that this rank sends,
R rows that its experts compute.
"""

from dataclasses import dataclass
from typing import Any

import torch

from neomoba_dist.parallel.comm import all_gather, all_reduce, all_to_all
from neomoba_dist.parallel.expert_rows import (
    RowOrder,
    combine,
    combine_backward,
    count_choices,
    order_by_expert,
    spread,
    spread_backward,
)
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.transfers import RowTransfer


@dataclass(frozen=True)
class Dispatch:
    """Where every row goes.

    rows: those that this rank sends. send, receive: rows to and from each member of ep. gathered: those of each tp
    rank, None without sequence parallelism. sizes: rows of each local expert. order_R: from the order of arrival to
    that by expert, inverse_R back; None where they are the same.
    """

    rows: RowOrder
    send: list[int]
    receive: list[int]
    gathered: list[int] | None
    sizes: list[int]
    order_R: torch.Tensor | None
    inverse_R: torch.Tensor | None


def plan_dispatch(expert_SK: torch.Tensor, num_experts: int, mesh: Mesh, fill: int = 0) -> Dispatch:
    """Work out where rows go, and agree on it with the other ranks of ep (and tp): the one exchange of counts.

    The all-to-alls need their sizes on the host: one copy. expert_SK, fill: see `order_by_expert`.
    """
    counts_E = count_choices(expert_SK, num_experts)
    ep, tp = mesh["ep"], mesh["tp"]
    sent = counts_E if not fill else torch.full_like(counts_E, fill)
    arriving = _exchange_counts(sent.view(ep.size, -1), mesh)  # [tp or 1, ep, experts of this rank]
    on_host = torch.cat((sent, arriving.flatten())).tolist()
    arrived = torch.tensor(on_host[num_experts:]).view(arriving.shape)
    by_source = arrived.sum(-1).tolist()
    send = torch.tensor(on_host[:num_experts]).view(ep.size, -1).sum(1).tolist()
    order_R = _order_by_expert(arriving, int(arrived.sum()))
    return Dispatch(
        rows=order_by_expert(expert_SK, counts_E, sum(send), fill),
        send=send,
        receive=by_source[tp.index if mesh.sequence_parallel else 0],
        gathered=[sum(rows) for rows in by_source] if mesh.sequence_parallel else None,
        sizes=arrived.sum((0, 1)).tolist(),
        order_R=order_R,
        inverse_R=None if order_R is None else order_R.argsort(),
    )


def _exchange_counts(counts: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Rows for each expert of this rank, by their source: [ep, experts of a rank] -> [tp or 1, ep, experts]."""
    size = mesh["ep"].size
    received = all_to_all(counts, mesh, "ep", [1] * size, [1] * size)
    return all_gather(received, mesh, "tp") if mesh.sequence_parallel else received[None]


def _order_by_expert(arriving: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Rows arrive by source and, within it, by expert; None where one source or one expert makes that no difference."""
    sources, experts = arriving.flatten(0, 1).shape
    if sources == 1 or experts == 1:
        return None
    expert = torch.arange(experts, device=arriving.device).repeat(sources)
    return expert.repeat_interleave(arriving.flatten(), output_size=rows).argsort(stable=True)


def send_to_experts(x_SH: torch.Tensor, dispatch: Dispatch, mesh: Mesh) -> RowTransfer:
    """Begin to bring the tokens to the ranks of their experts, which wait for them in `at_experts`."""
    return RowTransfer(_Spread.apply(x_SH, dispatch.rows), mesh, "ep", dispatch.send, dispatch.receive)


def at_experts(sent: RowTransfer, dispatch: Dispatch, mesh: Mesh) -> torch.Tensor:
    """The rows that have arrived [R, H], sorted by local expert, `dispatch.sizes` of each."""
    rows = sent.wait()
    if dispatch.gathered is not None:
        tp = mesh["tp"]
        # as an all-to-all of copies, because the tp ranks have different numbers of rows
        rows = all_to_all(rows.repeat(tp.size, 1), mesh, "tp", [len(rows)] * tp.size, dispatch.gathered)
    if dispatch.order_R is None:
        return rows
    return _Permute.apply(rows, dispatch.order_R, dispatch.inverse_R)


def from_experts(rows_RH: torch.Tensor, weight_SK: torch.Tensor, dispatch: Dispatch, mesh: Mesh) -> torch.Tensor:
    """Bring the results back and add them up: [S, H], token s the sum over its choices k of weight[s, k] * row.

    With tensor but without sequence parallelism the result is this tp rank's part of a sum over tp.
    """
    if dispatch.order_R is not None:
        rows_RH = _Permute.apply(rows_RH, dispatch.inverse_R, dispatch.order_R)
    if dispatch.gathered is not None:
        tp = mesh["tp"]
        own = dispatch.gathered[tp.index]
        rows_RH = all_to_all(rows_RH, mesh, "tp", dispatch.gathered, [own] * tp.size)
        rows_RH = rows_RH.unflatten(0, (tp.size, own)).sum(0)
    rows_PH = all_to_all(rows_RH, mesh, "ep", dispatch.receive, dispatch.send)
    return _Combine.apply(rows_PH, weight_SK, dispatch.rows)


def sum_over(tensor: torch.Tensor, mesh: Mesh, axis: str, *, averaged: bool) -> torch.Tensor:
    """The sum over the members of the axis; every member goes on with it and has the same loss from it.

    averaged: gradients of parameters are averaged over this axis later (dp, cp), so each member's part is multiplied
    by its size; over tp they are not.
    """
    if mesh[axis].size == 1:
        return tensor
    return _SumOver.apply(tensor, mesh, axis, float(mesh[axis].size if averaged else 1))


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mesh: Mesh, axis: str, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return all_reduce(tensor, mesh, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order. Indexing's own backward would add where this one moves."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.order = order
        return spread(x_SH, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return spread_backward(grads[0], ctx.order), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PH: torch.Tensor, weight_SK: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.save_for_backward(rows_PH, weight_SK)
        ctx.order = order
        return combine(rows_PH, weight_SK, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows_PH, weight_SK = ctx.saved_tensors
        return *combine_backward(grads[0], rows_PH, weight_SK, ctx.order), None
