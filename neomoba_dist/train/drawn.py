"""First weights under ZeRO-3: a rank draws its own part of each parameter and never holds the model whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neomoba_dist.model.init import draw_range


class DrawnOneByOne(nn.Module):
    """A module of deferred parameters, as `deepspeed.zero.Init` takes it apart.

    One parameter after the other gets memory for all of its elements, of the given dtype; DeepSpeed keeps this rank's
    part of it, and that is drawn.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            parameter.data = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
            yield parameter
            _draw_part(parameter)


@torch.no_grad()
def _draw_part(parameter: Any) -> None:
    """Of a parameter that DeepSpeed has just partitioned."""
    part = parameter.ds_tensor
    first = part.ds_numel * parameter.ds_zero_partition_rank
    held = max(0, min(part.ds_numel, parameter.ds_numel - first))
    draw_range(parameter, part.narrow(0, 0, held), first)
    part.narrow(0, held, part.ds_numel - held).zero_()
    parameter.ds_secondary_tensor = None  # hpZ's copy, of what was there before; made again from this part
