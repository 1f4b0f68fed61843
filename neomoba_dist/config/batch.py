"""Batch arithmetic: from tokens per update and the layout to micro-batches, for any number of ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.schema import ParallelConfig, PhaseConfig


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch of one update on `world_size` ranks; sizes count ranks, rows or positions.

    rows_per_update = micro_batch_size * gradient_accumulation_steps * data_parallel_size, DeepSpeed's train_batch_size;
    tokens_per_update = rows_per_update * sequence_length.
    """

    world_size: int
    data_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rows_per_update: int
    tokens_per_update: int


def plan_batch(
    phase: PhaseConfig, parallel: ParallelConfig, deepspeed: Mapping[str, Any], source: str, world_size: int
) -> BatchPlan:
    """Return the plan for `world_size` ranks; ConfigError names `source`, the key and the nearest values that work."""
    micro = int(deepspeed["train_micro_batch_size_per_gpu"])
    dp = _data_parallel_size(parallel, source, world_size)
    rows_per_step = micro * dp
    if phase.tokens_per_update % (rows_per_step * phase.sequence_length):
        raise ConfigError(
            f"{source}: neomoba.phase.tokens_per_update {phase.tokens_per_update} is not a multiple of "
            f"train_micro_batch_size_per_gpu {micro} x sequence_length {phase.sequence_length} x {dp} data-parallel "
            f"ranks; set it to {nearest_multiples(phase.tokens_per_update, rows_per_step * phase.sequence_length)}"
        )
    _check_hpz(deepspeed, source, world_size)
    rows = phase.tokens_per_update // phase.sequence_length
    accumulation = rows // rows_per_step
    stated = deepspeed.get("gradient_accumulation_steps", accumulation)
    if stated != accumulation:
        raise ConfigError(
            f"{source}: gradient_accumulation_steps is {stated}, but neomoba.phase.tokens_per_update "
            f"{phase.tokens_per_update} on {world_size} ranks needs {accumulation}; delete the key, it is derived"
        )
    return BatchPlan(
        world_size=world_size,
        data_parallel_size=dp,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rows_per_update=rows,
        tokens_per_update=phase.tokens_per_update,
    )


def nearest_multiples(value: int, step: int) -> str:
    """Return the multiples of `step` next to `value` in words, "2048 or 4096"; the lower one only when positive."""
    lower = value // step * step
    return f"{lower} or {lower + step}" if lower > 0 else str(step)


def _check_hpz(deepspeed: Mapping[str, Any], source: str, world_size: int) -> None:
    """Refuse a secondary ZeRO-3 partition that does not divide the ranks."""
    size = deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1)
    if world_size % size:
        raise ConfigError(
            f"{source}: zero_optimization.zero_hpz_partition_size {size} does not divide {world_size} ranks; "
            "set it to the number of GPUs of one machine"
        )


def _data_parallel_size(parallel: ParallelConfig, source: str, world_size: int) -> int:
    """Return the ranks left for data parallelism; ConfigError when the axes do not divide the world."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    size = tp * cp * pp
    if world_size < 1 or world_size % size:
        raise ConfigError(
            f"{source}: {world_size} ranks are not a multiple of neomoba.parallel.tensor_model_parallel_size "
            f"{tp} x context_parallel_size {cp} x pipeline_model_parallel_size {pp}; "
            f"start {nearest_multiples(world_size, size)} ranks (deepspeed --num_gpus N ...)"
        )
    ep, ranks = parallel.expert_model_parallel_size, world_size // (tp * pp)
    if ranks % ep:
        raise ConfigError(
            f"{source}: neomoba.parallel.expert_model_parallel_size {ep} does not divide the {ranks} ranks of "
            f"data and context parallelism; set it to {max(n for n in range(1, ep) if ranks % n == 0)}, or "
            f"start {nearest_multiples(world_size, math.lcm(size, tp * pp * ep))} ranks"
        )
    return world_size // size
