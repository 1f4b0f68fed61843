"""Collectives that are under way while the rank computes: begun here, waited for where their result is needed.

Like those of comm.py they name a mesh axis, and are counted when they arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from neomoba_dist.parallel.comm import num_bytes
from neomoba_dist.parallel.mesh import Mesh


class UnderWay:
    """A collective that has begun; not differentiable. received: bytes."""

    def __init__(
        self, result: torch.Tensor, request: Any, mesh: Mesh, axis: str, operation: str, received: int
    ) -> None:
        self._result, self._request = result, request
        self._mesh, self._counted = mesh, (axis, operation, received)

    def wait(self) -> torch.Tensor:
        """Its result. To be called once."""
        result, request = self._result, self._request
        del self._result, self._request  # whoever still holds the transfer holds no memory
        with self._mesh.record(*self._counted):
            request.wait()
        return result


def start_all_gather(tensor: torch.Tensor, mesh: Mesh, axis: str) -> UnderWay:
    """Begin `comm.all_gather` over an axis of two members or more."""
    size = mesh[axis].size
    result = tensor.new_empty((size, *tensor.shape))
    with mesh.record(axis, "all_gather", 0):
        request = dist.all_gather(list(result.unbind(0)), tensor.contiguous(), group=mesh[axis].group, async_op=True)
    return UnderWay(result, request, mesh, axis, "all_gather", (size - 1) * num_bytes(tensor))


class RowTransfer:
    """`comm.all_to_all` in two halves: rows leave now, and are there when `wait` returns. Differentiable.

    In the backward pass gradients leave where the rows were waited for, and are waited for where the rows left. What
    was computed in between, and not from the rows, runs beside them there, too: of the nodes that are ready autograd
    takes the newest.
    """

    def __init__(
        self, rows: torch.Tensor, mesh: Mesh, axis: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        self._journey = None if mesh[axis].size == 1 else _Journey(mesh, axis, send_counts, receive_counts)
        self._rows = rows if self._journey is None else _Leave.apply(rows, self._journey)

    def wait(self) -> torch.Tensor:
        """Everybody's rows, in axis order. To be called once."""
        rows = self._rows
        del self._rows  # as in UnderWay
        return rows if self._journey is None else _Arrive.apply(rows, self._journey)


@dataclass
class _Journey:
    """Of rows, and in the backward pass of their gradients the other way."""

    mesh: Mesh
    axis: str
    send: Sequence[int]
    receive: Sequence[int]
    under_way: UnderWay | None = None

    def start(self, rows: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """What the rows that arrive will fill."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        place, result = self.mesh[self.axis], rows.new_empty((sum(receive), *rows.shape[1:]))
        with self.mesh.record(self.axis, "all_to_all", 0):
            request = dist.all_to_all_single(
                result, rows.contiguous(), list(receive), list(send), group=place.group, async_op=True
            )
        from_others = num_bytes(result[receive[place.index] :])
        self.under_way = UnderWay(result, request, self.mesh, self.axis, "all_to_all", from_others)
        return result

    def wait(self) -> torch.Tensor:
        """The rows that have arrived."""
        assert self.under_way is not None
        under_way, self.under_way = self.under_way, None
        return under_way.wait()


class _Leave(torch.autograd.Function):
    """Gives the tensor that is being filled; what travels back reaches it through the journey."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, journey: _Journey) -> torch.Tensor:
        ctx.journey = journey
        return journey.start(rows)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.journey.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, not_filled: torch.Tensor, journey: _Journey) -> torch.Tensor:
        ctx.journey = journey
        journey.wait()
        return not_filled.view_as(not_filled)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.journey.start(grads[0], back=True)
        return grads[0], None


class RingTransfer:
    """Tensors on their way from the axis member before to the one after, while both compute. See `pass_on`."""

    def __init__(self, tensors: Sequence[torch.Tensor], mesh: Mesh, axis: str) -> None:
        self._mesh, self._axis, place = mesh, axis, mesh[axis]
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        target, source = (place.ranks[(place.index + step) % place.size] for step in (1, -1))
        operations = [
            *(dist.P2POp(dist.isend, tensor, target, group=place.group) for tensor in self._sent),
            *(dist.P2POp(dist.irecv, tensor, source, group=place.group) for tensor in self._received),
        ]
        with mesh.record(axis, "ring", 0):  # counted on arrival
            self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[torch.Tensor]:
        """What the member before has passed on."""
        total = sum(num_bytes(tensor) for tensor in self._received)
        with self._mesh.record(self._axis, "ring", total):
            for request in self._requests:
                request.wait()
        return self._received


def pass_on(tensors: Sequence[torch.Tensor], mesh: Mesh, axis: str) -> RingTransfer:
    """Start to send the tensors to the next member of the axis and to receive as many from the one before."""
    return RingTransfer(tensors, mesh, axis)
