"""What can be saved: flat fragments of logical tensors, as a training engine yields them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.parallel.mesh import Mesh


class StateFragment(NamedTuple):
    """Flat tensors of one parameter, by kind: elements from `start` on of the flattened part that `spec` describes."""

    spec: ShardedTensorSpec
    start: int
    values: Mapping[str, torch.Tensor]


class StateSource(Protocol):
    """What can be saved: a training engine."""

    config: Config
    mesh: Mesh

    def local_state(self) -> Iterator[StateFragment]: ...
