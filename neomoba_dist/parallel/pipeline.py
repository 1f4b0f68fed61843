"""Pipeline parallelism: a list of layers becomes DeepSpeed's PipelineModule (1F1B schedule, ZeRO-1).

The layers come as objects with `cls`, `kwargs`, `tied` and `call` (model/neobert.py); this module knows nothing else
of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from neomoba_dist.parallel.mesh import Mesh

# DeepSpeed's defaults here are silently wrong with sequence parallelism and fail with several float outputs.
PIPELINE_SETTINGS = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}


class PipelineStage(PipelineModule):
    """A stage whose layers also share what follows from the inputs: every stage makes its own, as messages are tensors.

    share: the inputs of a stage and the dtype of its weights -> what its layers get behind them; the first four outputs
    go on.
    """

    def __init__(self, *args: Any, share: Callable[[tuple[Any, ...], torch.dtype], Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        shared = self.share(inputs, next(self.parameters()).dtype)
        return super().forward((*inputs, shared))[:4]

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """Of each tied weight something with its gradient as `grad`, None if it has none; and the stages' group.

        In half precision ZeRO-1 moves each micro-batch's gradient to a float32 sum, and leaves none in the weight
        itself, which is where the pipeline engine looks.
        """
        return [
            (SimpleNamespace(grad=weight.grad if weight.grad_accum is None else weight.grad_accum), group)
            for weight, group in super().get_tied_weights_and_groups()
        ]


class LayerLike(Protocol):
    """What a layer list entry must offer."""

    @property
    def cls(self) -> type[nn.Module]: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...
    @property
    def tied(self) -> str | None: ...
    @property
    def call(self) -> Callable[..., Any] | None: ...


def build_pipeline(
    layers: Sequence[LayerLike],
    mesh: Mesh,
    loss_fn: Callable[[Any, Any], Any],
    balance: str,
    share: Callable[[tuple[Any, ...], torch.dtype], Any],
) -> PipelineModule:
    """This rank's stage of `layers`. balance: class name of the layers of which every stage gets an equal number.
    share: see `PipelineStage`.

    Rank order is the mesh's: pipe is the slowest axis, tp the fastest, dp x cp between them.
    """
    specs = [
        TiedLayerSpec(layer.tied, layer.cls, forward_fn=layer.call, tied_weight_attr="weight", **layer.kwargs)
        if layer.tied
        else LayerSpec(layer.cls, **layer.kwargs)
        for layer in layers
    ]
    topology = ProcessTopology(
        axes=["pipe", "data", "model"], dims=[mesh["pp"].size, mesh["dp_cp"].size, mesh["tp"].size]
    )
    with redirect_stdout(StringIO()):  # it prints its whole plan; our rank map says the same
        return PipelineStage(
            specs, topology=topology, loss_fn=loss_fn, partition_method=f"type:{balance}$", share=share
        )
