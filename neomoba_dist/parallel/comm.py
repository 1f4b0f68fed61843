"""The one door for our collectives.

Every call names a mesh axis, never a raw process group. That is what lets us count bytes per axis, time the calls and
say in which collective a rank is stuck. On an axis of size 1 every function is the identity and costs nothing.

megatron-core (tensor-parallel layers) and DeepSpeed (gradient reduction, pipeline sends) make their own calls; those
are not counted here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from neomoba_dist.parallel.ledger import CommunicationError
from neomoba_dist.parallel.mesh import Mesh

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def num_bytes(tensor: torch.Tensor) -> int:
    """Size of the tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


def all_reduce(tensor: torch.Tensor, mesh: Mesh, axis: str, op: str = "sum") -> torch.Tensor:
    """Reduce over the axis ("sum", "max" or "min"). Returns a new tensor; not differentiable."""
    if mesh[axis].size == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    with mesh.record(axis, "all_reduce", num_bytes(result)):
        dist.all_reduce(result, op=REDUCE_OPS[op], group=mesh[axis].group)
    return result


def broadcast(tensor: torch.Tensor, mesh: Mesh, axis: str, source: int) -> torch.Tensor:
    """Copy the tensor of the axis member number `source` to all members, in place. Returns the tensor."""
    if mesh[axis].size > 1:
        received = 0 if mesh[axis].index == source else num_bytes(tensor)
        with mesh.record(axis, "broadcast", received):
            dist.broadcast(tensor, src=mesh[axis].ranks[source], group=mesh[axis].group)
    return tensor


def send(tensor: torch.Tensor, mesh: Mesh, axis: str, target: int) -> None:
    """Give the tensor to the axis member number `target`, which calls `receive`. Not differentiable."""
    with mesh.record(axis, "send", 0):  # the receiver counts it
        dist.send(tensor.contiguous(), dst=mesh[axis].ranks[target], group=mesh[axis].group)


def receive(tensor: torch.Tensor, mesh: Mesh, axis: str, source: int) -> torch.Tensor:
    """Fill the contiguous tensor with what the axis member number `source` sends. Returns the tensor."""
    with mesh.record(axis, "receive", num_bytes(tensor)):
        dist.recv(tensor, src=mesh[axis].ranks[source], group=mesh[axis].group)
    return tensor


def all_gather(tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
    """The tensors, of one shape, of all members of the axis: [size, ...] in axis order. Not differentiable."""
    size = mesh[axis].size
    if size == 1:
        return tensor[None]
    result = tensor.new_empty((size, *tensor.shape))
    with mesh.record(axis, "all_gather", (size - 1) * num_bytes(tensor)):
        dist.all_gather(list(result.unbind(0)), tensor.contiguous(), group=mesh[axis].group)
    return result


def reduce_scatter(tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
    """Member i's sum of everybody's `tensor[i]`: [size, ...] -> [...]. Not differentiable.

    The parts travel in the dtype of the tensor and are added in axis order, in float32 for half precision: the same
    bits every time, and no rounding between the terms.
    """
    size = mesh[axis].size
    if size == 1:
        return tensor[0]
    ones = [1] * size
    parts = _exchange(tensor, mesh, axis, ones, ones, "reduce_scatter")
    return parts.sum(0, dtype=torch.promote_types(tensor.dtype, torch.float32)).to(tensor.dtype)


def all_to_all(
    rows: torch.Tensor, mesh: Mesh, axis: str, send_counts: Sequence[int], receive_counts: Sequence[int]
) -> torch.Tensor:
    """Send the first `send_counts[0]` rows to member 0 of the axis, and so on; get everybody's rows, in axis order.

    rows: [sum of send_counts, ...]; returns [sum of receive_counts, ...]. Differentiable: gradients travel back the
    same way. The ledger counts what other members sent.
    """
    if mesh[axis].size == 1:
        return rows
    return _AllToAll.apply(rows, mesh, axis, tuple(send_counts), tuple(receive_counts))


class _AllToAll(torch.autograd.Function):
    """Uneven exchange of rows; backward is the same with the counts swapped."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, mesh: Mesh, axis: str, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.arguments = (mesh, axis, receive, send)
        return _exchange(rows, mesh, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _exchange(grads[0], *ctx.arguments), None, None, None, None


def _exchange(
    rows: torch.Tensor,
    mesh: Mesh,
    axis: str,
    send: Sequence[int],
    receive: Sequence[int],
    operation: str = "all_to_all",
) -> torch.Tensor:
    result = rows.new_empty((sum(receive), *rows.shape[1:]))
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    others = sum(receive) - receive[mesh[axis].index]
    with mesh.record(axis, operation, others * row_bytes):
        dist.all_to_all_single(result, rows.contiguous(), list(receive), list(send), group=mesh[axis].group)
    return result


def all_gather_objects(value: Any, mesh: Mesh, axis: str) -> list[Any]:
    """The small picklable `value` of every member of the axis, in axis order. For start-up and checkpoints only."""
    if mesh[axis].size == 1:
        return [value]
    values: list[Any] = [None] * mesh[axis].size
    with mesh.record(axis, "all_gather_objects", 0):
        dist.all_gather_object(values, value, group=mesh[axis].group)
    return values


def barrier(mesh: Mesh, axis: str = "world") -> None:
    """Wait until every member of the axis has arrived."""
    if mesh[axis].size > 1:
        with mesh.record(axis, "barrier", 0):
            dist.barrier(group=mesh[axis].group)


def agree(ok: bool, mesh: Mesh) -> bool:
    """True where every rank of the world says True: one rank's failure becomes everybody's decision."""
    return not any_rank([not ok], mesh)[0]


def any_rank(flags: Sequence[bool], mesh: Mesh) -> list[bool]:
    """For each flag whether some rank of the world raised it; one collective for all of them."""
    raised = torch.tensor(flags, dtype=torch.int32, device=mesh.device)
    return all_reduce(raised, mesh, "world", op="max").bool().tolist()


def sum_together(parts: Mapping[str, torch.Tensor | Sequence[float]], mesh: Mesh) -> dict[str, torch.Tensor]:
    """The sums over the world of all `parts`, float64 on the CPU, bit for bit the same everywhere; one collective."""
    tensors = [torch.as_tensor(part, dtype=torch.float64, device=mesh.device) for part in parts.values()]
    whole = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), mesh, "world").cpu()
    sums = whole.split([tensor.numel() for tensor in tensors])
    return {name: total.view(tensor.shape) for name, tensor, total in zip(parts, tensors, sums, strict=True)}


def on_first_rank(mesh: Mesh, action: Callable[[], object]) -> None:
    """Run `action` on global rank 0 while all others wait; its failure is raised everywhere."""
    error: Exception | None = None
    if mesh.rank == 0:
        try:
            action()
        except Exception as caught:  # whatever it is, the waiting ranks must learn of it
            error = caught
    if not agree(error is None, mesh):
        raise error or CommunicationError(f"rank {mesh.rank}: rank 0 failed; see its message")


class _SumGradient(torch.autograd.Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_reduce(grads[0], ctx.mesh, ctx.axis), None, None


def sum_gradient(tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
    """A tensor that all members of the axis hold alike but use on different data: its gradient is their sum.

    Used for parameters that tensor parallelism replicates (norm weights under sequence parallelism, KV projections
    with fewer heads than ranks). Backward makes one all-reduce over the axis.
    """
    if mesh[axis].size == 1:
        return tensor
    return _SumGradient.apply(tensor, mesh, axis)


class _GatherRows(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        return all_gather(tensor, mesh, axis).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        parts = grads[0].unflatten(0, (ctx.mesh[ctx.axis].size, -1))
        return reduce_scatter(parts, ctx.mesh, ctx.axis), None, None


def gather_rows(tensor: torch.Tensor, mesh: Mesh, axis: str) -> torch.Tensor:
    """The rows of all members of the axis, as many of each, in axis order: [n, ...] -> [size * n, ...].

    Differentiable: a row's gradient is the sum over the members, which use all rows for different things.
    """
    if mesh[axis].size == 1:
        return tensor
    return _GatherRows.apply(tensor, mesh, axis)
