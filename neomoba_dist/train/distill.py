"""The engines of distillation: a student trained as any model, with a frozen teacher on the same mesh.

Of each micro-batch the teacher's forward comes first, in a pipeline beside that of the student, stage by stage. Below
ZeRO-3 a rank holds the teacher's part on its stage whole (but for tp), at ZeRO-3 its part over dp x cp, and in any case
the rows of the output matrix, which the student's head multiplies with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from neomoba_dist.checkpoint.body import BodyReader
from neomoba_dist.checkpoint.load import CheckpointReader, load_buffers, load_weights
from neomoba_dist.checkpoint.resume import read_together, require_whole_weights
from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.config.distill import matched_layers
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.block import Block
from neomoba_dist.model.distill import (
    Lesson,
    Projection,
    Student,
    Teacher,
    TeacherStage,
    distance,
    taught_losses,
)
from neomoba_dist.model.init import Initializer, views_of
from neomoba_dist.model.neobert import Head
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.tensor import enter_tensor_parallel
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.engines import FlatEngine, PipelineParallelEngine
from neomoba_dist.train.fragments import by_part


class DistillEngine(Engine):
    """What both have in common. reader: the teacher's weights, of any layout; collective over the world. Raises
    CheckpointError.

    `loss` is the sum of the losses with their weights; validation is that of any run, by labels alone.
    """

    PARTS = ("label_loss", "logit_loss", "hidden_loss")

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh, reader: CheckpointReader) -> None:
        self._taught_by = reader.config
        super().__init__(config, plan, mesh)
        require_whole_weights(reader, mesh)
        self.teacher = self._build_teacher()
        self.teacher.requires_grad_(False).to(mesh.device)
        self._load_teacher(reader)
        set_full_attention(self.teacher, self._taught_by.phase.full_attention_fraction == 1.0)  # as it was validated
        self.teacher.eval()

    @property
    def compares_states(self) -> bool:
        """Whether hidden states are part of the loss."""
        return self.config.distill.hidden_weight > 0

    @property
    def projected_size(self) -> int | None:
        """The teacher's width, where the student's states must be brought to it."""
        size = self._taught_by.model.hidden_size
        return size if self.compares_states and size != self.config.model.hidden_size else None

    def load(self, reader: CheckpointReader, *, moments: bool) -> None:
        """As any engine; weights alone may be those of a model that has not been taught."""
        super().load(reader if moments else BodyReader(reader, self.config), moments=moments)

    def _build_teacher(self) -> nn.Module:
        """Its part on this rank, without values."""
        raise NotImplementedError

    def _load_teacher(self, reader: CheckpointReader) -> None:
        """Its values."""
        dtype = getattr(torch, self.config.dtype_name)
        for parameter in self.teacher.parameters():
            parameter.data = torch.zeros(parameter.shape, dtype=dtype, device=self.mesh.device)
        read_together(self.mesh, lambda: load_weights(reader, self.teacher))

    def _of_all_tokens(self, hidden: torch.Tensor, num_valid: int) -> torch.Tensor:
        """Hidden states are compared at all tokens, of which every update has as many; padding adds nothing."""
        return hidden * (num_valid / self.config.phase.tokens_per_update)


class FlatDistillEngine(DistillEngine, FlatEngine):
    """pp = 1."""

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh, reader: CheckpointReader) -> None:
        super().__init__(config, plan, mesh, reader)
        layers = config.model.num_hidden_layers, self._taught_by.model.num_hidden_layers
        self._matched = matched_layers(*layers) if self.compares_states else ()

    def _build_module(self) -> nn.Module:
        settings = self._model_settings()
        return Student(self.config.model, self.mesh, self.projected_size, **settings).to(self.mesh.device)

    def _build_teacher(self) -> nn.Module:
        dtype, length = getattr(torch, self.config.dtype_name), self.config.phase.sequence_length
        return Teacher(self._taught_by.model, self.mesh, dtype=dtype, row_length=length, deferred=True)

    def _load_teacher(self, reader: CheckpointReader) -> None:
        assert isinstance(self.teacher, Teacher)
        if self.config.zero_stage < 3:
            super()._load_teacher(reader)
            self._output: torch.Tensor = output_matrix(self.teacher)
            return
        # kept whole: the student's head needs it in its backward pass too, long after the teacher's forward
        teacher, dtype = self.teacher, getattr(torch, self.config.dtype_name)
        self._output = read_together(self.mesh, lambda: read_output(reader, teacher, dtype))
        self._gathers = read_together(self.mesh, lambda: self.cut_frozen(teacher, reading(reader)))
        read_together(self.mesh, lambda: load_buffers(reader, teacher))

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        """The teacher's, of this rank's share of a micro-batch."""
        hidden, layers = self.teacher(batch, self._matched)
        return Lesson(self.config.distill.temperature, hidden, self._output, layers)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        (labels, logits, hidden), aux_loss = self.engine(batch, self.lesson(batch))
        hidden = self._of_all_tokens(hidden, batch.num_valid)
        self._part_sums += torch.stack((labels, logits, hidden)).detach()
        weights = self.config.distill
        loss = weights.label_weight * labels + weights.logit_weight * logits + weights.hidden_weight * hidden
        self._loss_sum += loss.detach()
        return loss, aux_loss


class PipelineDistillEngine(DistillEngine, PipelineParallelEngine):
    """pp > 1: the teacher's blocks lie beside those of the student, and its states travel with the student's.

    As bytes, for which the pipeline wants no gradient. Each stage adds what it compares to the sums of this rank, and
    its gradient to that of the auxiliary loss.
    """

    def _build_everywhere(self) -> nn.Module | None:
        if self.projected_size is None:
            return None
        init = Initializer(self.mesh, self.config.phase.seed, self.config.model.initializer_range)
        return Projection(self.projected_size, self.config.model.hidden_size, init)

    def _build_teacher(self) -> nn.Module:
        blocks = [module.index for module in self.module.modules() if isinstance(module, Block)]
        return TeacherStage(
            self._taught_by.model,
            self.mesh,
            blocks,
            self.config.model.num_hidden_layers,
            getattr(torch, self.config.dtype_name),
            self.config.phase.sequence_length,
        )

    def _run_stage(
        self, layers: Sequence[Callable[[Any], Any]], inputs: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        teacher, projection, pp = self.teacher, self.module.everywhere, self.mesh["pp"]
        assert isinstance(teacher, TeacherStage)
        assert isinstance(projection, nn.Module)
        own, taught = (inputs[:-1], inputs[-1]) if pp.index else (inputs, inputs[0])
        if not self.module.training:  # by labels alone; messages keep their shapes
            outputs = super()._run_stage(layers, own, dtype)
            size = self._taught_by.model.hidden_size * dtype.itemsize
            return (*outputs, taught if pp.index else inputs[0].new_zeros((len(outputs[0]), size), dtype=torch.uint8))
        with torch.no_grad():
            followed = teacher.arrive((taught.view(dtype) if pp.index else taught, *own[-2:]))
        state: tuple[Any, ...] = (*own, self._packed(own, dtype))
        apart = []
        for layer in layers:
            state = layer(state)
            if isinstance(layer, Block):
                with torch.no_grad():
                    followed = teacher.follow(layer.index, followed)
                if self.compares_states:
                    apart.append(distance(projection, state[0], followed[0], followed[2], self.mesh))
        hidden, aux_loss, *others = state[:4]
        with torch.no_grad():
            going = teacher.leave(followed).contiguous().view(torch.uint8)
        return hidden, aux_loss + self._compared(apart), *others, going

    def _compared(self, apart: list[torch.Tensor]) -> torch.Tensor | float:
        """Add up the differences of this stage; 0, with their gradient for the auxiliary loss."""
        if not apart:
            return 0.0
        weight, num_valid = self.config.distill.hidden_weight, self._num_valid
        hidden = self._of_all_tokens(torch.stack(apart).sum() / self.config.model.num_hidden_layers, num_valid)
        self._part_sums[2] += hidden.detach()
        self._loss_sum += weight * hidden.detach()
        scaled = weight * hidden * self.scale(num_valid, self._micro_batches)
        return scaled - scaled.detach()

    def _loss(self, outputs: Any, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, aux_loss, output, going = outputs
        if not self.module.training:
            return super()._loss((hidden, aux_loss, output), targets)
        labels, counted, scale = targets
        assert isinstance(self.teacher, TeacherStage)
        taught = enter_tensor_parallel(going.view(output.weight.dtype), self.mesh).index_select(0, counted)
        lesson = Lesson(self.config.distill.temperature, taught, output_matrix(self.teacher))
        label_loss, logit_loss = taught_losses(hidden, output.weight, labels, counted, lesson, self.mesh)
        weights = self.config.distill
        loss_sum = weights.label_weight * label_loss + weights.logit_weight * logit_loss
        self._part_sums[:2] += torch.stack((label_loss, logit_loss)).detach()
        self._loss_sum += loss_sum.detach()
        self._aux_sum += aux_loss.detach()
        return loss_sum * scale + aux_loss


def build_distill_engine(config: Config, plan: BatchPlan, mesh: Mesh, reader: CheckpointReader) -> DistillEngine:
    """The engine for the layout."""
    return (PipelineDistillEngine if mesh["pp"].size > 1 else FlatDistillEngine)(config, plan, mesh, reader)


def output_matrix(model: Teacher | TeacherStage) -> nn.Parameter:
    """What a teacher's logits are made with: its rows on this rank, [v, K]; of stages the last one has it."""
    head = model.head if isinstance(model, Teacher) else model.end[-1]
    assert isinstance(head, Head)
    return head.weight


def read_output(reader: CheckpointReader, model: Teacher, dtype: torch.dtype) -> torch.Tensor:
    """The rows of the output matrix that this rank holds, with zeros for padding: [v, K]."""
    weight = output_matrix(model)
    output = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    ((shard, view),) = views_of(weight, output)
    view.copy_(reader.read("model", shard))
    return output


def reading(reader: CheckpointReader) -> Callable[[nn.Parameter, torch.Tensor, int], None]:
    """Writes any stretch of a flattened parameter from a checkpoint; zeros for padding."""

    def write(parameter: nn.Parameter, out: torch.Tensor, start: int) -> None:
        out.zero_()
        for found in by_part(parameter, start, len(out), out, 0):
            values = torch.empty(found.valid)
            reader.read_range("model", found.shard, found.start, values)
            out[found.offset : found.offset + found.valid] = values.to(out.device)

    return write
