"""Batch arithmetic: from tokens per update and the layout to micro-batches, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neomoba_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from neomoba_dist.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch of one update on `world_size` ranks; sizes count ranks, rows or positions.

    rows_per_update = micro_batch_size * gradient_accumulation_steps * data_parallel_size (DeepSpeed's train_batch_size).
    tokens_per_update = rows_per_update * sequence_length.
    """

    world_size: int
    data_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rows_per_update: int
    tokens_per_update: int


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Return the plan for `world_size` ranks; ConfigError names the key and the nearest values that work."""
    parallel, phase = config.parallel, config.phase
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    if world_size < 1 or world_size % (tp * cp * pp):
        raise ConfigError(f"{config.source}: {world_size} ranks cannot hold tp {tp} x cp {cp} x pp {pp}")
    dp = world_size // (tp * cp * pp)
    micro = config.micro_batch_size
    step = micro * phase.sequence_length * dp
    if phase.tokens_per_update % step:
        raise ConfigError(f"{config.source}: neomoba.phase.tokens_per_update {phase.tokens_per_update} is not a multiple of {step}")
    accumulation = phase.tokens_per_update // step
    return BatchPlan(
        world_size=world_size,
        data_parallel_size=dp,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rows_per_update=micro * accumulation * dp,
        tokens_per_update=phase.tokens_per_update,
    )
