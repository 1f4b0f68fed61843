"""The engine of distillation: FlatEngine around a student, with a frozen teacher on the same mesh.

Of each micro-batch the teacher's forward comes first. Below ZeRO-3 a rank holds the teacher whole (but for tp), at
ZeRO-3 its part over dp x cp, and in any case the rows of the output matrix, which the student's head multiplies with.
"""

from collections.abc import Callable

import torch
from torch import nn

from neomoba_dist.checkpoint.body import BodyReader
from neomoba_dist.checkpoint.load import CheckpointReader, load_buffers, load_weights
from neomoba_dist.checkpoint.resume import read_together, require_whole_weights
from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.config.distill import matched_layers
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.distill import Lesson, Student, Teacher
from neomoba_dist.model.init import views_of
from neomoba_dist.model.neobert import Head
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engine import FlatEngine
from neomoba_dist.train.fragments import by_part


class DistillEngine(FlatEngine):
    """reader: the teacher's weights, of any layout; collective over the world. Raises CheckpointError.

    `loss` is the sum of the losses with their weights; validation is that of any run, by labels alone.
    """

    PARTS = ("label_loss", "logit_loss", "hidden_loss")

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh, reader: CheckpointReader) -> None:
        self._taught_by = reader.config
        super().__init__(config, plan, mesh)
        require_whole_weights(reader, mesh)
        dtype, model = getattr(torch, config.dtype_name), self._taught_by.model
        self.teacher = Teacher(model, mesh, dtype=dtype, row_length=config.phase.sequence_length, deferred=True)
        self.teacher.requires_grad_(False).to(mesh.device)
        if config.zero_stage == 3:
            # kept whole: the student's head needs it in its backward pass too, long after the teacher's forward
            self._output = read_together(mesh, lambda: read_output(reader, self.teacher, dtype))
            self._gathers = read_together(mesh, lambda: self.cut_frozen(self.teacher, reading(reader)))
            read_together(mesh, lambda: load_buffers(reader, self.teacher))
        else:
            for parameter in self.teacher.parameters():
                parameter.data = torch.zeros(parameter.shape, dtype=dtype, device=mesh.device)
            read_together(mesh, lambda: load_weights(reader, self.teacher))
            self._output = output_matrix(self.teacher)
        set_full_attention(self.teacher, self._taught_by.phase.full_attention_fraction == 1.0)  # as it was validated
        self.teacher.eval()
        compared = config.distill.hidden_weight > 0
        self._matched = matched_layers(config.model.num_hidden_layers, model.num_hidden_layers) if compared else ()

    def _build_module(self) -> nn.Module:
        student, teacher = self.config.model, self._taught_by.model
        projected = self.config.distill.hidden_weight > 0 and student.hidden_size != teacher.hidden_size
        size = teacher.hidden_size if projected else None
        return Student(student, self.mesh, size, **self._model_settings()).to(self.mesh.device)

    def load(self, reader: CheckpointReader, *, moments: bool) -> None:
        """As any engine; weights alone may be those of a model that has not been taught."""
        super().load(reader if moments else BodyReader(reader, self.config), moments=moments)

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        """The teacher's, of this rank's share of a micro-batch."""
        hidden, layers = self.teacher(batch, self._matched)
        return Lesson(self.config.distill.temperature, hidden, self._output, layers)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        (labels, logits, hidden), aux_loss = self.engine(batch, self.lesson(batch))
        # hidden states are compared at all tokens, of which every update has as many; padding adds nothing
        hidden = hidden * (batch.num_valid / self.config.phase.tokens_per_update)
        self._part_sums += torch.stack((labels, logits, hidden)).detach()
        weights = self.config.distill
        loss = weights.label_weight * labels + weights.logit_weight * logits + weights.hidden_weight * hidden
        return loss, aux_loss


def output_matrix(model: Teacher) -> nn.Parameter:
    """What a teacher's logits are made with: its rows on this rank, [v, K]."""
    assert isinstance(model.head, Head)
    return model.head.weight


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
