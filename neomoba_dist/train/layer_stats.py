"""Statistics of every layer in every update: gradient norms and the size of activations, the same on every rank."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.moe.router import RECORD
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.fragments import fragments, is_copy


def over_all_ranks(rows: torch.Tensor, places: Sequence[int], total: int, mesh: Mesh) -> torch.Tensor:
    """Sums over all tokens of an update, for the layers of all pipeline stages.

    rows: [n, K] of this stage's layers, sums over this rank's tokens; places: of each among the `total` rows.
    """
    if mesh.sequence_parallel:
        rows = all_reduce(rows, mesh, "tp")
    whole = rows.new_zeros(total, rows.shape[1])
    whole[list(places)] = all_reduce(rows, mesh, "dp_cp")
    return all_reduce(whole, mesh, "pp")


class LayerStatistics:
    """What every block of a pipeline stage adds up while it runs in training: the size of its output, its routing.

    sums: float64 [blocks, 2 + 4 + E] over this rank's tokens since they were last taken: squares and number of the
    output's elements, then a mixture's record (moe.router.RECORD); [blocks, 2] in a model without experts.
    """

    def __init__(self, module: nn.Module, config: ModelConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.blocks = [block for block in module.modules() if isinstance(block, Block)]
        width = 2 + (len(RECORD) + config.num_experts if config.moe_layers else 0)
        self.sums = torch.zeros(len(self.blocks), width, dtype=torch.float64, device=mesh.device)
        for block, row in zip(self.blocks, self.sums, strict=True):
            block.observe = functools.partial(_add, row)

    def take(self) -> tuple[list[float], torch.Tensor | None]:
        """Sums over all tokens of the update that just ran, the same on every rank; they start again at zero.

        Returns the root mean square of the residual stream after every block, and float64 [L, 4 + E] of the layers
        with experts, in `config.moe_layers` order (None without).
        """
        places = [block.index for block in self.blocks]
        whole = over_all_ranks(self.sums, places, self.config.num_hidden_layers, self.mesh)
        self.sums.zero_()
        squares, count = whole[:, :2].unbind(1)
        routing = whole[list(self.config.moe_layers), 2:] if self.config.moe_layers else None
        return (squares / count).sqrt().tolist(), routing


@torch.no_grad()
def _add(row: torch.Tensor, output: torch.Tensor, record: torch.Tensor | None) -> None:
    exact = torch.promote_types(output.dtype, torch.float32)
    row[0] += torch.linalg.vector_norm(output, dtype=exact) ** 2
    row[1] += output.numel()
    if record is not None:
        row[2:] += record


class GradientNorms:
    """Gradient norm of every layer, read off the flat fp32 partitions when AdamW steps on them.

    zero: DeepSpeed's ZeRO optimizer around `optimizer`; it is asked where each parameter lies in a partition.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, zero: Any, stage: int, module: nn.Module, num_layers: int, mesh: Mesh
    ) -> None:
        self.mesh, self.num_layers = mesh, num_layers
        self._squares = torch.zeros(num_layers + 1, dtype=torch.float64, device=mesh.device)
        self._places: dict[torch.Tensor, list[tuple[int, int, int]]] = {}
        counted = (parameter for parameter in module.parameters() if not is_copy(parameter, mesh))
        for found in fragments(counted, zero, stage, mesh):
            place = (found.offset, found.numel, self._layer(found.parameter))
            self._places.setdefault(found.flat, []).append(place)
        optimizer.register_step_pre_hook(self._on_step)

    def take(self, norm: float, clipping: float) -> list[float]:
        """Norms of the layers, then that of all other parameters; their squares add up to `norm` squared.

        norm: of all gradients, before they were clipped to `clipping` (0: not).
        """
        squares = all_reduce(self._squares, self.mesh, "world").tolist()
        self._squares.zero_()
        scale = max(1.0, (norm + 1e-6) / clipping) if clipping else 1.0  # DeepSpeed's own formula
        return [math.sqrt(square) * scale for square in squares]

    def _layer(self, parameter: nn.Parameter) -> int:
        parts = shard_of(parameter).name.split(".")
        return int(parts[1]) if parts[0] == "blocks" else self.num_layers

    def _on_step(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                for start, length, layer in self._places.get(flat, ()):
                    norm = torch.linalg.vector_norm(flat.grad.narrow(0, start, length), dtype=torch.float32)
                    self._squares[layer] += norm.to(self._squares.device) ** 2
