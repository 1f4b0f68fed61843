"""Rules of distillation, and which teacher a student's configuration allows."""

import dataclasses
from collections.abc import Iterator

from neomoba_dist.config.context import ulysses_ranks
from neomoba_dist.config.root import Config
from neomoba_dist.config.schema import ModelConfig


def distillation(config: Config) -> Iterator[str]:
    """Refuse what no student learns from, or on."""
    settings = config.distill
    if settings.teacher is None:
        return
    if not (settings.logit_weight or settings.hidden_weight or settings.label_weight):
        yield (
            "neomoba.distill.logit_weight, hidden_weight and label_weight are all 0, so nothing is learned; set "
            "logit_weight to 1"
        )
    if config.model.prediction_head:
        yield (
            "neomoba.model.prediction_head true cannot be distilled: the losses know an output matrix alone; set it to "
            "false, or neomoba.distill.teacher to null"
        )
    if config.finetune.tasks is not None:
        yield "neomoba.distill.teacher teaches no neomoba.finetune.tasks; set one of the two to null"
    if config.phase.recompute == "auto":
        yield "neomoba.phase.recompute auto plans without the teacher's memory; set it to none, selective or full"


def matched_layers(student: int, teacher: int) -> tuple[int, ...]:
    """For every layer of the student the layer of the teacher that it is held against: every so many-th, the last one
    by the last one (TinyBERT, arXiv 1909.10351, section 4.1)."""
    step = teacher // student
    return tuple(range(step - 1, teacher, step))


def teacher_problems(config: Config, teacher: ModelConfig) -> Iterator[str]:
    """Why a model cannot teach the student of `config`, beyond the rules that hold for any model on its layout."""
    student, cp = config.model, config.parallel.context_parallel_size
    for key in ("vocab_size", "objective"):
        theirs, ours = getattr(teacher, key), getattr(student, key)
        if theirs != ours:
            yield f"its {key} is {theirs}, and neomoba.model.{key} is {ours}; both must have the same tokens and task"
    if teacher.prediction_head:
        yield "it has a prediction_head, and the losses know an output matrix alone; take another teacher"
    layers, taught = teacher.num_hidden_layers, student.num_hidden_layers
    if config.distill.hidden_weight and layers % taught:
        divisors = [size for size in range(1, layers + 1) if layers % size == 0]
        yield (
            f"its {layers} layers are no multiple of the student's {taught}, so neomoba.distill.hidden_weight "
            f"{config.distill.hidden_weight:g} has no layers to compare; set neomoba.model.num_hidden_layers to one of "
            f"{divisors}, or hidden_weight to 0"
        )
    experts = config.parallel.expert_model_parallel_size
    if teacher.num_experts and experts > 1 and config.zero_stage == 3:
        yield (
            f"it has experts, which zero_optimization.stage 3 cuts over all ranks and expert_model_parallel_size "
            f"{experts} over some; set zero_optimization.stage to 2"
        )
    if cp == 1:
        return
    if config.parallel.context_parallel_split == "block_cyclic" and teacher.moba_block_size != student.moba_block_size:
        yield (
            f"its moba_block_size {teacher.moba_block_size} deals tokens to context-parallel ranks in another way than "
            f"neomoba.model.moba_block_size {student.moba_block_size}; set neomoba.parallel.context_parallel_split to "
            "zigzag"
        )
    theirs, ours = (_ulysses(model, config) for model in (teacher, student))
    if theirs != ours:
        yield (
            f"its {teacher.num_key_value_heads} KV heads would be split over {theirs} of {cp} context-parallel ranks, "
            f"the student's {student.num_key_value_heads} over {ours}; set context_parallel_size to 1, or "
            f"neomoba.model.num_key_value_heads to {teacher.num_key_value_heads}"
        )


def as_teacher(config: Config, teacher: ModelConfig, source: str) -> Config:
    """The configuration of a teacher on the student's layout, for the rules that hold for any model there."""
    parallel = config.parallel
    if not teacher.num_experts:
        parallel = dataclasses.replace(parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=None)
    return dataclasses.replace(config, model=teacher, parallel=parallel, source=source)


def _ulysses(model: ModelConfig, config: Config) -> int:
    heads = max(1, model.num_key_value_heads // config.parallel.tensor_model_parallel_size)
    return ulysses_ranks(config.parallel.context_parallel_size, heads)
