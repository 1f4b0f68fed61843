"""How a parameter comes into being: declared by logical name and whole shape, drawn whole, then sliced.

The draw depends on (seed, logical name) alone, so the initial weights are the same for every layout, and the `Shard`
that each parameter carries tells checkpoints where its values lie in the whole tensor.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shard:
    """Where a parameter lies in its logical tensor.

    shape: shape of the whole tensor. dim: the dimension that tp splits, None if every rank holds it whole.
    offset, length: the part of that dimension held here; the parameter may be longer (vocabulary padding), what lies
    beyond `length` is padding, always zero, and belongs to no checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    offset: int = 0
    length: int = 0

    @property
    def start(self) -> tuple[int, ...]:
        """Offset of the part in every dimension."""
        return tuple(self.offset if d == self.dim else 0 for d in range(len(self.shape)))

    @property
    def extent(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(self.length if d == self.dim else n for d, n in enumerate(self.shape))

    def valid(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a local tensor without its padding."""
        return tensor if self.dim is None else tensor.narrow(self.dim, 0, self.length)


def shard_of(parameter: nn.Parameter) -> Shard:
    """The `Shard` of a parameter that an `Initializer` made."""
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
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(self.std * scale).to(self.dtype)
        return self._place(name, whole, shard_dim, padded)

    def ones(self, name: str, size: int) -> nn.Parameter:
        """A norm's weight: ones, held whole on every rank, without weight decay."""
        return self._place(name, torch.ones(size, dtype=self.dtype), None, 0)

    def _place(self, name: str, whole: torch.Tensor, shard_dim: int | None, padded: int) -> nn.Parameter:
        tp = self.mesh["tp"]
        if shard_dim is None:
            parameter, shard = nn.Parameter(whole), Shard(name, tuple(whole.shape))
        else:
            total = whole.shape[shard_dim]
            local = (padded or total) // tp.size
            offset = min(tp.index * local, total)
            length = min(local, total - offset)
            shape = [local if d == shard_dim else n for d, n in enumerate(whole.shape)]
            part = whole.new_zeros(shape)
            part.narrow(shard_dim, 0, length).copy_(whole.narrow(shard_dim, offset, length))
            parameter, shard = nn.Parameter(part), Shard(name, tuple(whole.shape), shard_dim, offset, length)
        parameter.shard = shard  # type: ignore[attr-defined]
        # DeepSpeed sums the squared norms of marked parameters over tp and counts all others once
        parameter.tensor_model_parallel = shard_dim is not None and tp.size > 1  # type: ignore[attr-defined]
        return parameter
