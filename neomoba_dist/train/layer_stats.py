"""Statistics of every layer in every update: gradient norms and the size of activations, the same on every rank."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.moe.router import RECORD
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.fragments import flat_partitions, fragments, is_copy


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
        indices = [block.index for block in self.blocks]
        self._indices = torch.tensor(indices, dtype=torch.int64, device=mesh.device)  # a list would be copied each time
        for block, row in zip(self.blocks, self.sums, strict=True):
            block.observe = functools.partial(_add, row)

    def take(self) -> torch.Tensor:
        """This rank's part of the sums over all tokens of the update that just ran; they start again at zero.

        float64 [layers of the whole model, 2 + 4 + E]; the sum over the world is that over all tokens.
        """
        part = self.sums.new_zeros(self.config.num_layers, self.sums.shape[1])
        if self.mesh.sequence_parallel or self.mesh["tp"].index == 0:  # the others hold the same tokens
            part[self._indices] = self.sums
        self.sums.zero_()
        return part

    def read(self, whole: torch.Tensor) -> tuple[list[float], torch.Tensor | None]:
        """From the sums over the world, see `take`: what every rank knows of the update.

        Returns the root mean square of the residual stream after every block, and float64 [L, 4 + E] of the layers
        with experts, in `config.moe_layers` order (None without).
        """
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
    """Gradient norm of every layer, read where DeepSpeed's ZeRO optimizer `zero` is about to step on the gradients.

    They lie end to end as in the float32 partitions: as lists of tensors, or with offload as the gradients of those.
    """

    def __init__(self, zero: Any, stage: int, module: nn.Module, num_layers: int, mesh: Mesh) -> None:
        self.zero, self.stage, self.num_layers, self.mesh = zero, stage, num_layers, mesh
        self._by_row: tuple[torch.Tensor, torch.Tensor] | None = None  # order of the gradients, how many a row has
        numbers = {id(flat): number for number, flat in enumerate(flat_partitions(zero, stage))}
        self._rows: list[dict[int, tuple[int, int]]] = [{} for _ in numbers]  # offset -> (elements, row of the result)
        for found in fragments(module.parameters(), zero, stage, mesh):
            row = num_layers + 1 if is_copy(found.parameter, mesh) else self._layer(found.parameter)
            self._rows[numbers[id(found.flat)]][found.offset] = (found.numel, row)

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """Squared norms of this rank's gradients before clipping: float64 [num_layers + 2].

        Of every layer, of all other parameters, and of what another rank counts. The sum over the world of the first
        num_layers + 1 is that of the whole model.
        """
        found = [
            pair
            for number, flat in enumerate(flat_partitions(self.zero, self.stage))
            for pair in self._gradients(number, flat)
        ]
        if not found:
            return torch.zeros(self.num_layers + 2, dtype=torch.float64, device=self.mesh.device)
        rows, gradients = zip(*found, strict=True)
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).to(self.mesh.device, torch.float64)
        if self._by_row is None:  # the same in every update, but DeepSpeed's pieces are not known before the first one
            row = torch.tensor(rows)
            counts = torch.bincount(row, minlength=self.num_layers + 2)
            self._by_row = row.argsort(stable=True).to(norms.device), counts.to(norms.device)
        order, counts = self._by_row
        # adds in the same order every time, unlike index_add on a GPU
        squares = norms.square().index_select(0, order) / self.zero.loss_scale**2
        return torch.segment_reduce(squares, "sum", lengths=counts, initial=0, unsafe=True)

    def _gradients(self, number: int, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(row of the result, gradient) of every fragment in a partition."""
        rows, pieces = self._rows[number], self.zero.averaged_gradients.get(number)
        if pieces is None:  # offload
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize()  # the copies to the host
            assert flat.grad is not None
            for offset, (numel, row) in rows.items():
                yield row, flat.grad.narrow(0, offset, numel)
            return
        offset = 0
        for piece in pieces:
            if offset in rows:  # else padding
                yield rows[offset][1], piece
            offset += piece.numel()

    def _layer(self, parameter: nn.Parameter) -> int:
        parts = shard_of(parameter).name.split(".")
        return int(parts[1]) if parts[0] == "blocks" else self.num_layers
