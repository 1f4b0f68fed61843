"""Pipeline parallelism: a list of layers becomes DeepSpeed's PipelineModule (1F1B schedule, ZeRO-1).

The layers come as objects with `cls`, `kwargs` and `tied` (model/neobert.py); this module knows nothing else
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
TIED = "weight"  # the parameter that tied layers share

Run = Callable[[Sequence[Callable[[Any], Any]], tuple[Any, ...], torch.dtype], tuple[Any, ...]]


class PipelineStage(PipelineModule):
    """A stage of which the caller says how its layers run.

    run: the stage's layers, its inputs and the dtype of its weights -> its outputs, of which two have a gradient, the
    first ones. everywhere: a module that every stage has a copy of; its weights are trained as one.
    """

    def __init__(self, *args: Any, mesh: Mesh, run: Run, everywhere: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mesh, self.run = mesh, run
        self.everywhere = everywhere or nn.Identity()
        for weight in self.everywhere.parameters():
            weight.ds_pipe_replicated = mesh["pp"].index > 0  # type: ignore[attr-defined]  # DeepSpeed's mark
        for module in self.tied_modules.values():  # of which another stage holds the tied weight alone
            for name, parameter in module.named_parameters():
                parameter.ds_pipe_replicated &= name == TIED

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs = self.run(self.forward_funcs, inputs, next(self.parameters()).dtype)
        if not torch.is_grad_enabled() or self.mesh["pp"].index == self.mesh["pp"].size - 1:
            return outputs
        first, second, *others = outputs
        sent = first.detach().requires_grad_()
        return sent, _Together.apply(second, first, sent), *others

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """Of each tied weight something with its gradient as `grad`, None if it has none; and the stages' group.

        In half precision ZeRO-1 moves each micro-batch's gradient to a float32 sum, and leaves none in the weight
        itself, which is where the pipeline engine looks.
        """
        tied = super().get_tied_weights_and_groups()
        tied += [(weight, self.mesh["pp"].group) for weight in self.everywhere.parameters()]
        return [
            (SimpleNamespace(grad=weight.grad if weight.grad_accum is None else weight.grad_accum), group)
            for weight, group in tied
        ]


class _Together(torch.autograd.Function):
    """One backward pass for two outputs of a stage.

    DeepSpeed runs one for each, so that a stage whose second output depends on its layers too (balance losses) would go
    through them twice. Here the first pass ends in the leaf `sent`, and the second one takes its gradient along.
    """

    @staticmethod
    def forward(ctx: Any, second: torch.Tensor, first: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        ctx.sent = sent
        return second.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, ctx.sent.grad = ctx.sent.grad, None
        return grads[0], grad, None


class LayerLike(Protocol):
    """What a layer list entry must offer."""

    @property
    def cls(self) -> type[nn.Module]: ...
    @property
    def kwargs(self) -> Mapping[str, Any]: ...
    @property
    def tied(self) -> str | None: ...


def build_pipeline(
    layers: Sequence[LayerLike],
    mesh: Mesh,
    loss_fn: Callable[[Any, Any], Any],
    balance: str,
    run: Run,
    everywhere: nn.Module | None = None,
) -> PipelineModule:
    """This rank's stage of `layers`. balance: class name of the layers of which every stage gets an equal number.
    run, everywhere: see `PipelineStage`.

    Rank order is the mesh's: pipe is the slowest axis, tp the fastest, dp x cp between them.
    """
    specs = [
        TiedLayerSpec(layer.tied, layer.cls, tied_weight_attr=TIED, **layer.kwargs)
        if layer.tied
        else LayerSpec(layer.cls, **layer.kwargs)
        for layer in layers
    ]
    topology = ProcessTopology(
        axes=["pipe", "data", "model"], dims=[mesh["pp"].size, mesh["dp_cp"].size, mesh["tp"].size]
    )
    with redirect_stdout(StringIO()):  # it prints its whole plan; our rank map says the same
        return PipelineStage(
            specs,
            topology=topology,
            loss_fn=loss_fn,
            partition_method=f"type:{balance}$",
            mesh=mesh,
            run=run,
            everywhere=everywhere,
        )
