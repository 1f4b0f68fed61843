"""Layouts of a phase on so many ranks: which are possible, which fit, and which should be the fastest."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from neomoba_dist.config import BatchPlan, Config, ConfigError, ModelConfig, ParallelConfig
from neomoba_dist.config.root import BLOCKS
from neomoba_dist.config.rules import check_rules
from neomoba_dist.model.init import views_of
from neomoba_dist.parallel.mesh import Axis, Mesh
from neomoba_dist.train.checkpoint_plan import stage_module
from neomoba_dist.train.distill_plan import PlannedTeacher
from neomoba_dist.train.expert_groups import check_rows
from neomoba_dist.train.memory_plan import NO_TEACHER, Beside, RankMemory, Stage, matrix_memory, plan_memory
from neomoba_dist.train.step_plan import Machine, StepPlan, plan_step, update_flops

RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")  # the less, the faster
CLOSE = 1.05  # times as long: stated rates tell no closer
RESERVE = 0.1  # part of a device's memory for what is not planned


@dataclass(frozen=True)
class Layout:
    """A configuration on its ranks. memory: of the fullest rank. muon_memory: bytes that Muon holds for a moment of an
    update, of which `memory` has them if it is the fullest one. teacher: its part of `memory`."""

    config: Config
    plan: BatchPlan
    memory: RankMemory
    muon_memory: int
    teacher: Beside
    step: StepPlan

    @property
    def cut(self) -> dict[str, int]:
        """Ranks along the axes that cut the model or its tokens, where there are several."""
        parallel = self.config.parallel
        sizes = {
            "tp": parallel.tensor_model_parallel_size,
            "cp": parallel.context_parallel_size,
            "pp": parallel.pipeline_model_parallel_size,
            "ep": parallel.expert_model_parallel_size,
        }
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def axes(self) -> str:
        """In words."""
        config, split = self.config, "".join(f"{name} {size} " for name, size in self.cut.items())
        return (
            f"{split}dp {self.plan.data_parallel_size} ZeRO-{config.zero_stage} micro-batch {config.micro_batch_size} "
            f"x {self.plan.gradient_accumulation_steps} recompute {config.phase.recompute}"
        )


class Planner:
    """For one number of ranks and one kind of machine. The model's parts are built once, on the meta device.

    device: "cuda" or "cpu", where the model would run. teacher: of a student.
    """

    def __init__(
        self, world_size: int, machine: Machine, device: str = "cuda", teacher: PlannedTeacher | None = None
    ) -> None:
        self.world_size, self.machine, self.device, self.teacher = world_size, machine, torch.device(device), teacher
        self._stages: dict[tuple[Any, ...], Stage] = {}
        self._flops: dict[tuple[ModelConfig, float, int, int], tuple[float, float]] = {}

    def layout(self, config: Config) -> Layout:
        """What the configuration comes to. Raises ConfigError where it cannot run on these ranks."""
        plan = config.plan(self.world_size)
        stages = config.parallel.pipeline_model_parallel_size
        places = [self._place(config, stage) for stage in sorted({0, stages - 1})]  # others hold and do less
        check_rows(config, places[0][0])
        found = []
        for place in places:
            beside = self._teacher_memory(config, plan, place[0])
            found.append((plan_memory(config, plan, *place, beside), beside))
        memory, teacher = max(found, key=lambda pair: pair[0].total)
        muon_memory = max(matrix_memory(*place, config.zero_stage) for place in places)
        phase = (
            config.model,
            config.phase.full_attention_fraction,
            config.phase.sequence_length,
            plan.tokens_per_update,
        )
        if phase not in self._flops:
            taught = self.teacher.flops(config, plan) if self.teacher else 0.0
            self._flops[phase] = update_flops(config, plan), taught
        step = plan_step(config, plan, *places[0], self.machine, *self._flops[phase])
        return Layout(config, plan, memory, muon_memory, teacher, step)

    def with_recompute(self, config: Config, budget: float) -> Config:
        """With `recompute: auto` made the least recomputation that fits the budget, or "full" where none does.

        Raises ConfigError where the configuration cannot run on these ranks.
        """
        if config.phase.recompute != "auto":
            return config
        for way in RECOMPUTE:
            trial = replace(config, phase=replace(config.phase, recompute=way))
            if self.layout(trial).memory.total <= budget:
                break
        return trial

    def best(self, config: Config, budget: float) -> "Search":
        """Of every way to cut the world the best layout whose fullest rank holds at most `budget` bytes; best first."""
        fitting: dict[ParallelConfig, list[Layout]] = {}
        refused = large = 0
        config = replace(config, phase=replace(config.phase, recompute="none"))  # every way is tried
        for candidate in candidates(config, self.world_size, self.machine.gpus):
            try:
                check_rules(candidate)
                self.layout(candidate)
            except ConfigError:
                refused += 1
                continue
            found = list(self._fitting(candidate, budget))
            large += not found
            for layout in found:
                fitting.setdefault(layout.config.parallel, []).append(layout)
        fastest = min((layout.step.seconds for layouts in fitting.values() for layout in layouts), default=0.0)
        best = [min(layouts, key=_preference(fastest)) for layouts in fitting.values()]
        return Search(sorted(best, key=_preference(fastest)), refused, large)

    def build(self, config: Config) -> dict[tuple[int, int, int], int]:
        """Parameters of every kind of rank, by its place in tp, pp and ep, each made on the meta device."""
        plan = config.plan(self.world_size)
        sizes: dict[tuple[int, int, int], int] = {}
        for rank in range(plan.world_size):
            mesh = Mesh.place(config.parallel, plan.world_size, rank)
            axes = _axes_of_stage(mesh)
            tp, pp, ep = (axis.index for axis in axes)
            if (tp, pp, ep) not in sizes:
                sizes[tp, pp, ep] = sum(parameter.numel() for parameter in stage_module(config, *axes).parameters())
        return sizes

    def _fitting(self, config: Config, budget: float) -> Iterator[Layout]:
        """Every size of micro-batch and way to recompute that fits."""
        for recompute in RECOMPUTE:
            for rows in _powers_of_two(config.phase.tokens_per_update // config.phase.sequence_length):
                trial = replace(
                    config,
                    deepspeed={**config.deepspeed, "train_micro_batch_size_per_gpu": rows},
                    phase=replace(config.phase, recompute=recompute, recompute_every=1),
                )
                try:
                    layout = self.layout(trial)
                except ConfigError:  # the update does not divide by it
                    break
                if layout.memory.total > budget:
                    break
                yield layout

    def _teacher_memory(self, config: Config, plan: BatchPlan, mesh: Mesh) -> Beside:
        if self.teacher is None:
            return NO_TEACHER
        _, stage = self._place(self.teacher.beside(config), mesh["pp"].index)
        return self.teacher.memory(config, plan, mesh, stage)

    def _place(self, config: Config, stage: int) -> tuple[Mesh, Stage]:
        """The first rank of a pipeline stage, and what it holds."""
        parallel = config.parallel
        rank = stage * (self.world_size // parallel.pipeline_model_parallel_size)
        heads = config.model.num_key_value_heads
        mesh = replace(Mesh.place(parallel, self.world_size, rank, num_key_value_heads=heads), device=self.device)
        axes = _axes_of_stage(mesh)
        key = (config.model, config.phase.optimizer, *axes)
        if key not in self._stages:
            self._stages[key] = Stage.of(stage_module(config, *axes), config.phase.optimizer)
        return mesh, self._stages[key]


@dataclass(frozen=True)
class Search:
    """layouts: the best first. refused: layouts that cannot run; large: that fit no memory."""

    layouts: list[Layout]
    refused: int
    large: int


def candidates(config: Config, world_size: int, gpus: int) -> Iterator[Config]:
    """Every way to cut the world, with a micro-batch of one row; tensor parallelism stays in one machine."""
    ranks, model = _divisors(world_size), config.model
    for tp in (size for size in ranks if size <= gpus):
        for pp in (size for size in _divisors(world_size // tp) if size <= model.num_hidden_layers):
            for cp in _divisors(world_size // tp // pp):
                for ep in _divisors(world_size // tp // pp) if model.num_experts else [1]:
                    for stage in (1,) if pp > 1 else (1, 2, 3):
                        yield with_layout(config, tp, pp, cp, ep, stage)


def with_layout(config: Config, tp: int, pp: int, cp: int, ep: int, stage: int) -> Config:
    """The same phase, cut in this way."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=None,
        sequence_parallel=tp > 1,
    )
    changed = {
        "zero_optimization": {**config.deepspeed["zero_optimization"], "stage": stage},
        "train_micro_batch_size_per_gpu": 1,
    }
    kept = {key: value for key, value in config.deepspeed.items() if key != "gradient_accumulation_steps"}
    return replace(config, parallel=parallel, deepspeed=kept | changed)


def settings(config: Config) -> dict[str, Any]:
    """The JSON of a configuration, without what is the default anyway."""
    tree = config.to_dict()
    for name, kind in BLOCKS.items():
        defaults = {field.name: field.default for field in fields(kind)}
        tree["neomoba"][name] = {key: value for key, value in tree["neomoba"][name].items() if value != defaults[key]}
    tree["neomoba"] = {name: block for name, block in tree["neomoba"].items() if block}
    return tree


def parameter_counts(config: Config) -> tuple[int, int]:
    """Parameters of the model, and those that a token meets: of a mixture its chosen experts."""
    total, active = 0, 0.0
    for parameter in stage_module(config, Axis(), Axis(), Axis()).parameters():
        for shard, _ in views_of(parameter):
            size = math.prod(shard.shape)
            total += size
            active += size * (config.model.num_experts_per_tok / config.model.num_experts if "ep" in shard.axes else 1)
    return total, round(active)


def _axes_of_stage(mesh: Mesh) -> tuple[Axis, Axis, Axis]:
    """tp, pp and ep, which decide what a rank holds, without the ranks along them: alike for many ranks."""
    tp, pp, ep = (Axis(mesh[axis].size, mesh[axis].index) for axis in ("tp", "pp", "ep"))
    return tp, pp, ep


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers_of_two(most: int) -> Iterator[int]:
    return (1 << exponent for exponent in range(most.bit_length()))


def _preference(fastest: float) -> Callable[[Layout], tuple[float, ...]]:
    """Layouts that are CLOSE to the fastest first, simple ones before others: fewer and smaller axes, less ZeRO, larger
    micro-batches; then the rest, fast ones first. fastest: seconds of its step."""

    def key(layout: Layout) -> tuple[float, ...]:
        seconds, simple = layout.step.seconds, (layout.config.zero_stage, -layout.config.micro_batch_size)
        if seconds > CLOSE * fastest:
            return (1, seconds, *simple)
        return (0, len(layout.cut), math.prod(layout.cut.values()), *simple, seconds)

    return key
