"""How a parameter comes into being: declared by logical name and whole shape; each rank draws only what it holds.

Element i of the tensor `name` is a function of (seed, name, i), so the initial weights are the same for every layout,
and the `ShardedTensorSpec` that each parameter carries tells checkpoints where its values lie in the whole tensor.

A parameter may stack several logical tensors row upon row, so that one matrix product serves all of them (q, k and v).
Only the layer that declares it and this module know: everybody else goes through the `Part`s of a parameter.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from neomoba_dist.model.normal import normal
from neomoba_dist.parallel.mesh import Mesh

_AT_A_TIME = 1 << 16  # elements: their numbers, 8 bytes each, stay in a processor's cache


@dataclass(frozen=True)
class ShardedTensorSpec:
    """Where a parameter lies in its logical tensor.

    shape: of the whole tensor. start, extent: offset and shape of the part held here; left out: the whole. The
    parameter may be longer (vocabulary padding); what lies beyond `extent` is padding, always zero, and belongs to no
    checkpoint. axes: the mesh axes that cut the tensor, "tp" or "ep" or both; all other ranks hold copies.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...] = ()
    extent: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.start:
            object.__setattr__(self, "start", (0,) * len(self.shape))
            object.__setattr__(self, "extent", self.shape)

    def valid(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a local tensor without its padding."""
        for dim, length in enumerate(self.extent):
            tensor = tensor.narrow(dim, 0, length)
        return tensor


@dataclass(frozen=True)
class FirstValues:
    """The initial values of a parameter, any stretch of them by itself.

    shard: where it lies in its logical tensor. shape: of what is held here, with padding. std: standard deviation of
    the normal draw; None: ones.
    """

    shard: ShardedTensorSpec
    shape: tuple[int, ...]
    seed: int
    std: float | None

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        """Into `out` [n], any device and dtype, what lies from `start` on in the flattened parameter; padding is 0."""
        if self.std is None:
            out.fill_(1.0)
            return
        digest = hashlib.sha256(f"{self.seed}:{self.shard.name}".encode()).digest()
        key = int.from_bytes(digest[:8], "little")
        columns, stop = self.shape[-1], start + len(out)
        step = max(1, _AT_A_TIME // columns)
        for row in range(start // columns, -(-stop // columns), step):
            first, last = max(start, row * columns), min(stop, (row + step) * columns)
            rows = torch.arange(row, -(-last // columns), device=out.device)
            values = self._rows(rows, key, self.std).flatten()
            out[first - start : last - start] = values[first - row * columns : last - row * columns]

    def _rows(self, rows: torch.Tensor, key: int, std: float) -> torch.Tensor:
        """Values of some rows, [rows, columns]; a row is what differs in the last dimension only."""
        shard = self.shard
        number, held, stride = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool), shard.shape[-1]
        for dim in reversed(range(len(self.shape) - 1)):
            place = rows % self.shape[dim]
            rows = rows // self.shape[dim]
            number += (place + shard.start[dim]) * stride
            held &= place < shard.extent[dim]
            stride *= shard.shape[dim]
        column = torch.arange(self.shape[-1], device=rows.device)
        values = normal(number[:, None] + (column + shard.start[-1]), key, std)
        if shard.extent != self.shape:
            values.masked_fill_(~(held[:, None] & (column < shard.extent[-1])), 0.0)
        return values


class Part(NamedTuple):
    """What a parameter holds of one logical tensor: the elements from `first` on of the flattened parameter."""

    first: int
    values: FirstValues

    @property
    def shard(self) -> ShardedTensorSpec:
        return self.values.shard

    @property
    def stop(self) -> int:
        """The element after the last one, which may be padding."""
        return self.first + math.prod(self.values.shape)


def parts_of(parameter: nn.Parameter) -> tuple[Part, ...]:
    """The parts of a parameter that an `Initializer` made, which lie in it row upon row."""
    return parameter.parts  # type: ignore[attr-defined]  # a plain attribute: DeepSpeed keeps the object


def shard_of(parameter: nn.Parameter) -> ShardedTensorSpec:
    """The `ShardedTensorSpec` of a parameter that holds one logical tensor; of several the first (axes are alike)."""
    return parts_of(parameter)[0].shard


def views_of(
    parameter: nn.Parameter, tensor: torch.Tensor | None = None
) -> Iterator[tuple[ShardedTensorSpec, torch.Tensor]]:
    """Of every logical tensor in a parameter where it lies and, without padding, a view of what is held here.

    tensor: of the parameter's shape, to look at in its place, such as its gradient.
    """
    tensor = parameter.detach() if tensor is None else tensor
    parts = parts_of(parameter)
    rows = tensor.split([part.values.shape[0] for part in parts])
    for part, held in zip(parts, rows, strict=True):
        yield part.shard, part.shard.valid(held)


def draw_range(parameter: nn.Parameter, out: torch.Tensor, start: int = 0) -> None:
    """First values into `out` [n], any device and dtype, from `start` on in the flattened parameter; padding is 0."""
    for part in parts_of(parameter):
        first, last = max(start, part.first), min(start + len(out), part.stop)
        if first < last:
            part.values.write(out[first - start : last - start], first - part.first)


@dataclass(frozen=True)
class Initializer:
    """Creates parameters, on the mesh's device.

    std: standard deviation of the normal draw (`initializer_range`); dtype: of the result. deferred: they take no
    memory and have no values yet; who places them has `draw_range` write them.
    """

    mesh: Mesh
    seed: int
    std: float
    dtype: torch.dtype = torch.float32
    deferred: bool = False

    def weight(
        self, name: str, shape: tuple[int, ...], *, shard_dim: int | None = None, scale: float = 1.0, padded: int = 0
    ) -> nn.Parameter:
        """A matrix drawn from N(0, (scale * std)^2), cut over tp along `shard_dim`.

        padded: length of `shard_dim` after zero padding (0: none); must divide by tp.
        """
        return self._parameter(self._matrix(name, shape, shard_dim, scale, padded))

    def stacked(self, shapes: Mapping[str, tuple[int, int]], *, shard_dim: int | None) -> nn.Parameter:
        """Several matrices of one width, by name, row upon row in one parameter, each cut over tp as by `weight`."""
        return self._parameter(*(self._matrix(name, shape, shard_dim) for name, shape in shapes.items()))

    def experts(self, name: str, shape: tuple[int, int, int], *, shard_dim: int, scale: float = 1.0) -> nn.Parameter:
        """Matrices of all experts, [experts, ...]: those of this rank of ep, each cut over tp along `shard_dim`."""
        ep = self.mesh["ep"]
        local = shape[0] // ep.size
        start, extent = [ep.index * local, 0, 0], [local, *shape[1:]]
        start[shard_dim], extent[shard_dim], _ = self._cut(shape[shard_dim])
        shard = ShardedTensorSpec(name, shape, tuple(start), tuple(extent), ("ep", "tp"))
        return self._parameter(FirstValues(shard, shard.extent, self.seed, self.std * scale))

    def ones(self, name: str, size: int) -> nn.Parameter:
        """A norm's weight: ones, held whole on every rank, without weight decay."""
        return self._parameter(FirstValues(ShardedTensorSpec(name, (size,)), (size,), self.seed, None))

    def draw(self, shard: ShardedTensorSpec) -> torch.Tensor:
        """The initial values of a part of a matrix: N(0, std^2)."""
        out = torch.empty(shard.extent, dtype=self.dtype, device=self.mesh.device)
        FirstValues(shard, shard.extent, self.seed, self.std).write(out.view(-1))
        return out

    def _matrix(
        self, name: str, shape: tuple[int, ...], shard_dim: int | None, scale: float = 1.0, padded: int = 0
    ) -> FirstValues:
        start, extent, local = [0] * len(shape), list(shape), list(shape)
        axes: tuple[str, ...] = ()
        if shard_dim is not None:
            start[shard_dim], extent[shard_dim], local[shard_dim] = self._cut(shape[shard_dim], padded)
            axes = ("tp",)
        shard = ShardedTensorSpec(name, shape, tuple(start), tuple(extent), axes)
        return FirstValues(shard, tuple(local), self.seed, self.std * scale)

    def _cut(self, total: int, padded: int = 0) -> tuple[int, int, int]:
        """(offset, length, length with padding) of this tp rank's part of a dimension."""
        tp = self.mesh["tp"]
        local = (padded or total) // tp.size
        offset = min(tp.index * local, total)
        return offset, min(local, total - offset), local

    def _parameter(self, *stack: FirstValues) -> nn.Parameter:
        assert len({values.shard.axes for values in stack}) == 1, "a parameter is a copy, or an expert's, as a whole"
        shape = (sum(values.shape[0] for values in stack), *stack[0].shape[1:])
        placed = not self.deferred and self.mesh.device.type != "meta"
        data = torch.empty(shape if placed else (), dtype=self.dtype, device=self.mesh.device)
        parameter = nn.Parameter(data.expand(shape))
        firsts = accumulate((math.prod(values.shape) for values in stack), initial=0)
        parameter.parts = tuple(map(Part, firsts, stack))  # type: ignore[attr-defined]
        if placed:
            draw_range(parameter, data.view(-1))
        return parameter
