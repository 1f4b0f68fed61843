"""Knowledge distillation: a student learns from the logits and hidden states of a frozen teacher, and from labels.

Three losses: of tokens that count the cross entropy with their labels, and t^2 KL(teacher || student) of the two
distributions at temperature t (arXiv 1503.02531, section 2); of all tokens but padding the mean squared difference of
hidden states after matched layers (arXiv 1909.10351, equation 8), where a learned matrix takes the student's to the
teacher's width if the two differ.

Shape letters: T tokens, S tokens of this rank (T / tp under sequence parallelism), C tokens that count, H hidden size
of the student, K of the teacher, v vocabulary rows of this rank (padding included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.block import Block, State
from neomoba_dist.model.cross_entropy import chunk_logits, chunks, local_targets
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.neobert import IGNORE_INDEX, Head, Inputs, NeoBERT, layer_list
from neomoba_dist.model.segments import NextSentence
from neomoba_dist.parallel.comm import all_reduce, sum_gradient
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.tensor import enter_tensor_parallel

PROJECTION_NAME = "distill.projection"


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a micro-batch, without gradients.

    hidden_CK: final hidden states of the tokens in `Batch.counted`, on every tp rank. output_vK: the rows of the
    teacher's output matrix that this rank holds. layers_SK: states after the layers that the student's are held
    against, one for each of these; none where hidden states are not compared.
    """

    temperature: float
    hidden_CK: torch.Tensor
    output_vK: torch.Tensor
    layers_SK: Sequence[torch.Tensor] = ()


class Teacher(NeoBERT):
    """A frozen model that is asked for the hidden states of a `Lesson`."""

    def forward(self, batch: Inputs, layers: Sequence[int] = ()) -> Any:  # type: ignore[override]
        """(hidden_CK, layers_SK): those after the layers with these numbers."""
        assert batch.counted is not None
        found = []
        for number, state in enumerate(self.block_states(batch)):
            last = state
            if number in layers:
                found.append(state[0])
        hidden_TK = enter_tensor_parallel(self.final_norm(last)[0], self.mesh)
        return hidden_TK.index_select(0, batch.counted), found


class TeacherStage(nn.Module):
    """The part of a frozen model that lies on a pipeline stage: layers beside the student's blocks.

    Block i of the student's n has the teacher's blocks from i N / n to (i + 1) N / n of N beside it, rounded down, so
    that states are compared where both are at hand. blocks: the student's on this stage, of `of` ones in all.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, blocks: Sequence[int], of: int, dtype: torch.dtype, row_length: int
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.dtype, self.of = config, mesh, dtype, of
        init = Initializer(mesh, 0, config.initializer_range, dtype, deferred=True)
        layers = layer_list(config, init, row_length=row_length)
        layers = [layer for layer in layers if layer.cls is not NextSentence]
        first = next(place for place, layer in enumerate(layers) if issubclass(layer.cls, Block))
        numbers = [number for index in blocks for number in self._beside(index)]
        self.start, self.end = nn.ModuleList(), nn.ModuleList()
        if mesh["pp"].index == 0:
            self.start.extend(layer.cls(**layer.kwargs) for layer in layers[:first])
        kept = {str(number): layers[first + number] for number in numbers}
        self.blocks = nn.ModuleDict({name: layer.cls(**layer.kwargs) for name, layer in kept.items()})
        if mesh["pp"].index == mesh["pp"].size - 1:
            self.end.extend(layer.cls(**layer.kwargs) for layer in layers[-2:])

    def _beside(self, index: int) -> range:
        return range(*(place * self.config.num_hidden_layers // self.of for place in (index, index + 1)))

    def arrive(self, inputs: tuple[torch.Tensor, ...]) -> State:
        """The state on this stage. inputs: ids on the first one, hidden states elsewhere; positions, borders."""
        arrived, position_ids, cu_seqlens = inputs
        packed = PackedTokens.of(position_ids, cu_seqlens, self.config, self.mesh, self.dtype, None)
        if not self.start:
            return arrived, torch.zeros((), device=arrived.device), position_ids, cu_seqlens, packed
        state: Any = (arrived, position_ids, cu_seqlens, packed)
        for layer in self.start:
            state = layer(state)
        return state

    def follow(self, index: int, state: State) -> State:
        """Past the blocks beside the student's block `index`."""
        for number in self._beside(index):
            state = self.blocks[str(number)](state)
        return state

    def leave(self, state: State) -> torch.Tensor:
        """What goes on from this stage, [S, K]: hidden states, on the last one after the final norm."""
        return self.end[0](state)[0] if self.end else state[0]


class Projection(nn.Module):
    """The student's width to the teacher's, one matrix [K, H] for all layers."""

    def __init__(self, teacher_size: int, student_size: int, init: Initializer) -> None:
        super().__init__()
        self.mesh = init.mesh
        self.weight = init.weight(PROJECTION_NAME, (teacher_size, student_size))

    def forward(self, x_SH: torch.Tensor) -> torch.Tensor:
        # under sequence parallelism each tp rank has other tokens, and a part of the gradient
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.mesh.sequence_parallel else self.weight
        return F.linear(x_SH, weight)


class TaughtHead(Head):
    """The output matrix, which also compares logits: inside `forward`, where ZeRO-3 has the weight gathered."""

    def forward(
        self,
        state: State,
        labels_T: torch.Tensor,
        counted_C: torch.Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> torch.Tensor:
        """With a lesson cross entropy and divergence summed over the tokens that count, [2]; else as `Head`."""
        if lesson is None:
            return super().forward(state, labels_T, counted_C)
        assert counted_C is not None
        return taught_losses(state[0], self.weight, labels_T, counted_C, lesson, self.mesh)


class Student(NeoBERT):
    """A model that can be taught. teacher_size: the teacher's hidden size, where another one than the student's is to
    be compared with it."""

    head_class = TaughtHead

    def __init__(self, config: ModelConfig, mesh: Mesh, teacher_size: int | None, **settings: Any) -> None:
        super().__init__(config, mesh, **settings)
        self.projection: nn.Module = nn.Identity()
        if teacher_size is not None:
            init = Initializer(
                mesh,
                settings.get("seed", 0),
                config.initializer_range,
                settings.get("dtype", torch.float32),
                settings.get("deferred", False),
            )
            self.projection = Projection(teacher_size, config.hidden_size, init)

    def forward(self, batch: Inputs, lesson: Lesson | None = None) -> Any:  # type: ignore[override]
        """With a lesson (losses, auxiliary loss): the sums of the losses by labels, logits and hidden states. Else as
        `NeoBERT`, for validation."""
        if lesson is None:
            return super().forward(batch)
        apart = []
        for number, state in enumerate(self.block_states(batch)):
            last = state
            if lesson.layers_SK:
                taught = lesson.layers_SK[number]
                apart.append(distance(self.projection, state[0], taught, batch.position_ids, self.mesh))
        last = self.final_norm(last)
        hidden = torch.stack(apart).mean() if apart else torch.zeros_like(last[1])
        return (*self.head(last, batch.labels, batch.counted, lesson), hidden), last[1]


def distance(
    projection: nn.Module, x_SH: torch.Tensor, taught_SK: torch.Tensor, position_ids: torch.Tensor, mesh: Mesh
) -> torch.Tensor:
    """Mean square over the width of the difference, summed over the tokens: a scalar, alike on all tp ranks."""
    exact = torch.promote_types(x_SH.dtype, torch.float32)
    squares_S = (projection(x_SH).to(exact) - taught_SK.to(exact)).square().mean(dim=-1)
    first = mesh["tp"].index * len(squares_S) if mesh.sequence_parallel else 0
    own = squares_S.where(position_ids.narrow(0, first, len(squares_S)) >= 0, 0).sum()
    if not mesh.sequence_parallel:
        return own
    others = all_reduce(own, mesh, "tp") - own.detach()
    return own + others  # whose gradient the other ranks have


def taught_losses(
    hidden_SH: torch.Tensor,
    weight_vH: nn.Parameter,
    labels_T: torch.Tensor,
    counted_C: torch.Tensor,
    lesson: Lesson,
    mesh: Mesh,
) -> torch.Tensor:
    """Cross entropy and divergence summed over the tokens that count, [2]."""
    hidden_CH = enter_tensor_parallel(hidden_SH, mesh).index_select(0, counted_C)
    labels_C = labels_T.index_select(0, counted_C)
    losses = taught_cross_entropy(hidden_CH, weight_vH, labels_C.clamp(min=0), lesson, mesh)
    return losses.where(labels_C != IGNORE_INDEX, 0).sum(dim=1)


def taught_cross_entropy(
    hidden_NH: torch.Tensor, weight_vH: nn.Parameter, labels_N: torch.Tensor, lesson: Lesson, mesh: Mesh
) -> torch.Tensor:
    """For every token -log softmax(s)[label] and t^2 KL(softmax(u / t) || softmax(s / t)): [2, N], s the student's
    logits, u the teacher's. Vocabulary-parallel and in token chunks, as cross_entropy.py has it.

    Arguments and dtype as for `vocab_parallel_cross_entropy`; the tokens are those of `lesson.hidden_CK`.
    """
    shard = shard_of(weight_vH)
    losses, divergences = _TaughtCrossEntropy.apply(
        hidden_NH,
        weight_vH,
        labels_N,
        lesson.hidden_CK,
        lesson.output_vK,
        lesson.temperature,
        mesh,
        shard.start[0],
        shard.extent[0],
    )
    return torch.stack((losses, divergences * lesson.temperature**2))


class _TaughtCrossEntropy(torch.autograd.Function):
    """Cross entropy and KL divergence of one product of hidden states and output matrix, made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        taught: torch.Tensor,
        output: torch.Tensor,
        temperature: float,
        mesh: Mesh,
        offset: int,
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses, divergences = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        # of softmax(s), softmax(s / t), softmax(u / t)
        log_normalisers = hidden.new_empty(3, len(hidden), dtype=dtype)
        for part in chunks(len(hidden)):
            logits = chunk_logits(hidden[part], weight, length, dtype)
            aims = chunk_logits(taught[part], output, length, dtype)
            target, owned = local_targets(labels[part], offset, length)
            largest = all_reduce(torch.stack((logits.amax(dim=-1), aims.amax(dim=-1))), mesh, "tp", op="max")
            logits -= largest[0, :, None]
            target_logit = logits.gather(1, target[:, None]).squeeze(1).where(owned, 0)  # padding rows are -inf
            plain = logits.exp().sum(dim=-1)
            logits /= temperature
            aims = aims.sub_(largest[1, :, None]).div_(temperature)
            shares = aims.exp()
            apart = (shares * aims.sub_(logits))[:, :length].sum(dim=-1)  # -inf - -inf in padding
            own = torch.stack((plain, target_logit, logits.exp_().sum(dim=-1), shares.sum(dim=-1), apart))
            plain, target_logit, soft, aimed, apart = all_reduce(own, mesh, "tp")
            losses[part] = plain.log() - target_logit
            divergences[part] = apart / aimed + soft.log() - aimed.log()
            log_normalisers[0, part] = plain.log() + largest[0]
            log_normalisers[1, part] = soft.log() + largest[0] / temperature
            log_normalisers[2, part] = aimed.log() + largest[1] / temperature
        ctx.save_for_backward(hidden, weight, labels, taught, output, log_normalisers)
        ctx.temperature, ctx.offset, ctx.length = temperature, offset, length
        return losses, divergences

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, taught, output, log_normalisers = ctx.saved_tensors
        dtype, temperature = log_normalisers.dtype, ctx.temperature
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        for part in chunks(len(hidden)):
            plain, soft, aimed = log_normalisers[:, part, None]
            logits = chunk_logits(hidden[part], weight, ctx.length, dtype)
            aims = chunk_logits(taught[part], output, ctx.length, dtype)
            apart = (logits / temperature - soft).exp_() - aims.div_(temperature).sub_(aimed).exp_()
            grad_logits = logits.sub_(plain).exp_()
            target, owned = local_targets(labels[part], ctx.offset, ctx.length)
            grad_logits.scatter_add_(1, target[:, None], -owned[:, None].to(dtype))
            grad_logits *= grads[0][part, None]
            grad_logits += apart.mul_(grads[1][part, None] / temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), *(None,) * 7
