"""How a parameter comes into being: declared by logical name and whole shape, drawn whole, then sliced.

The draw depends on (seed, logical name) alone, so the initial weights are the same for every layout, and the
`ShardedTensorSpec` that each parameter carries tells checkpoints where its values lie in the whole tensor.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from neomoba_dist.parallel.mesh import Mesh


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


def shard_of(parameter: nn.Parameter) -> ShardedTensorSpec:
    """The `ShardedTensorSpec` of a parameter that an `Initializer` made."""
    return parameter.shard  # type: ignore[attr-defined]  # a plain attribute: DeepSpeed keeps the object


@dataclass(frozen=True)
class Initializer:
    """Creates parameters. std: standard deviation of the normal draw (`initializer_range`); dtype: of the result."""

    mesh: Mesh
    seed: int
    std: float
    dtype: torch.dtype = torch.float32

    def weight(
        self, name: str, shape: tuple[int, ...], *, shard_dim: int | None = None, scale: float = 1.0, padded: int = 0
    ) -> nn.Parameter:
        """A matrix drawn from N(0, (scale * std)^2), cut over tp along `shard_dim`.

        padded: length of `shard_dim` after zero padding (0: none); must divide by tp.
        """
        whole = self.draw(name, shape, scale)
        if shard_dim is None:
            return self._parameter(whole, ShardedTensorSpec(name, shape))
        part, shard = self._cut(whole, ShardedTensorSpec(name, shape), shard_dim, padded)
        return self._parameter(part, shard)

    def experts(self, name: str, shape: tuple[int, int, int], *, shard_dim: int, scale: float = 1.0) -> nn.Parameter:
        """Matrices of all experts, [experts, ...]: those of this rank of ep, each cut over tp along `shard_dim`.

        Each is drawn by itself, so that a rank never holds those of the others.
        """
        ep = self.mesh["ep"]
        local = shape[0] // ep.size
        first = ep.index * local
        start, extent = [first, 0, 0], [local, *shape[1:]]
        parts = []
        for expert in range(first, first + local):
            whole = self.draw(f"{name}.{expert}", shape[1:], scale)
            part, shard = self._cut(whole, ShardedTensorSpec(name, shape[1:]), shard_dim - 1, 0)
            parts.append(part)
        start[1:], extent[1:] = shard.start, shard.extent
        return self._parameter(
            torch.stack(parts), ShardedTensorSpec(name, shape, tuple(start), tuple(extent), ("ep", "tp"))
        )

    def ones(self, name: str, size: int) -> nn.Parameter:
        """A norm's weight: ones, held whole on every rank, without weight decay."""
        return self._parameter(torch.ones(size, dtype=self.dtype), ShardedTensorSpec(name, (size,)))

    def draw(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        """The initial values of the whole tensor of this name: N(0, (scale * std)^2)."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(self.std * scale).to(self.dtype)

    def _cut(
        self, whole: torch.Tensor, shard: ShardedTensorSpec, dim: int, padded: int
    ) -> tuple[torch.Tensor, ShardedTensorSpec]:
        """This tp rank's part along `dim`, zero beyond the whole tensor's length."""
        tp, total = self.mesh["tp"], whole.shape[dim]
        local = (padded or total) // tp.size
        offset = min(tp.index * local, total)
        length = min(local, total - offset)
        part = whole.new_zeros([local if d == dim else n for d, n in enumerate(whole.shape)])
        part.narrow(dim, 0, length).copy_(whole.narrow(dim, offset, length))
        start = tuple(offset if d == dim else 0 for d in range(whole.ndim))
        extent = tuple(length if d == dim else n for d, n in enumerate(whole.shape))
        return part, ShardedTensorSpec(shard.name, shard.shape, start, extent, ("tp",))

    def _parameter(self, part: torch.Tensor, shard: ShardedTensorSpec) -> nn.Parameter:
        parameter = nn.Parameter(part)
        parameter.shard = shard  # type: ignore[attr-defined]
        # DeepSpeed sums the squared norms of marked parameters over tp and counts all others once
        parameter.tensor_model_parallel = "tp" in shard.axes and self.mesh["tp"].size > 1  # type: ignore[attr-defined]
        return parameter
