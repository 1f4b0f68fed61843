"""Rules of fine-tuning, and the configuration of one of its runs."""

import dataclasses
import math
from collections.abc import Iterator

from neomoba_dist.config.root import Config
from neomoba_dist.config.suggest import closest
from neomoba_dist.config.text_tasks import TEXT_TASKS, names_of


def finetuning(config: Config) -> Iterator[str]:
    """Refuse tasks that do not exist, and layouts that a head on whole texts does not run on."""
    settings, parallel = config.finetune, config.parallel
    if settings.tasks is None:
        return
    for key, names in (("tasks", names_of(settings.tasks)), ("transfer", names_of(settings.transfer))):
        for name in names:
            if name not in TEXT_TASKS:
                near = closest(name, TEXT_TASKS)
                advice = f"did you mean {near}?" if near else f"choose from {', '.join(TEXT_TASKS)}"
                yield f"neomoba.finetune.{key} {name!r} is no task; {advice}"
                return
    if missing := sorted(set(names_of(settings.transfer)) - set(names_of(settings.tasks))):
        yield f"neomoba.finetune.transfer {missing[0]} is not among neomoba.finetune.tasks; add it there"
    if settings.transfer and names_of(settings.tasks)[0] != "mnli":
        yield (
            "neomoba.finetune.transfer starts tasks from the mnli run, which must be trained first; let "
            "neomoba.finetune.tasks begin with mnli, or set transfer to null"
        )
    if config.model.causal and settings.pooling == "cls":
        yield (
            "neomoba.finetune.pooling cls takes the first token, which sees nothing of the text in a causal model; set "
            "pooling to mean"
        )
    for axis, size in (
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size),
        ("context_parallel_size", parallel.context_parallel_size),
        ("expert_model_parallel_size", parallel.expert_model_parallel_size),
    ):
        if size > 1:
            yield (
                f"neomoba.parallel.{axis} {size} cannot fine-tune on whole texts, which are short; set it to 1 and use "
                "tensor_model_parallel_size, data parallelism and ZeRO, whatever layout the checkpoint was written by"
            )


def for_task(config: Config, task: str, seed: int, examples: int) -> Config:
    """The configuration of one run on one task: its seed, and with `epochs` its own number of steps.

    examples: of the training set. Steps, warm-up and decay are stretched alike.
    """
    phase, settings = config.phase, config.finetune
    steps, scale = phase.steps, 1.0
    every = config.log.validate_every
    if settings.epochs is not None:
        epoch = max(1, math.ceil(examples * phase.sequence_length / phase.tokens_per_update))
        steps = max(1, math.ceil(settings.epochs * epoch))
        scale, every = steps / phase.steps, min(every, epoch)
    decay = None if phase.decay_steps is None else max(1, int(phase.decay_steps * scale))
    return dataclasses.replace(
        config,
        phase=dataclasses.replace(
            phase, name=task, seed=seed, steps=steps, warmup_steps=int(phase.warmup_steps * scale), decay_steps=decay
        ),
        finetune=dataclasses.replace(settings, tasks=task, seeds=1, epochs=None, transfer=None),
        log=dataclasses.replace(config.log, validate_every=every),
    )
