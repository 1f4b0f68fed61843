"""First weights under ZeRO-3: a rank writes its own parts of parameters and never holds the model whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# a parameter, where to write [n], the first of these elements in the flattened parameter
WritePart = Callable[[nn.Parameter, torch.Tensor, int], None]


class WrittenOneByOne(nn.Module):
    """A module of deferred parameters, as `deepspeed.zero.Init` takes it apart.

    One parameter after the other gets memory for all of its elements, of the given dtype; DeepSpeed keeps this rank's
    part of it, and that is written.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, write: WritePart) -> None:
        super().__init__()
        self.module, self.dtype, self.write = module, dtype, write

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            parameter.data = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
            yield parameter
            _write_part(parameter, self.write)


@torch.no_grad()
def _write_part(parameter: Any, write: WritePart) -> None:
    """Of a parameter that DeepSpeed has just partitioned."""
    part = parameter.ds_tensor
    first = part.ds_numel * parameter.ds_zero_partition_rank
    held = max(0, min(part.ds_numel, parameter.ds_numel - first))
    write(parameter, part.narrow(0, 0, held), first)
    part.narrow(0, held, part.ds_numel - held).zero_()
    parameter.ds_secondary_tensor = None  # hpZ's copy, of what was there before; made again from this part
