"""Bytes that a rank of a layout will hold, without the rank: weights, gradients, optimizer, activations and buffers.

Parameters are those that the model's own code makes on the meta device (checkpoint_plan.stage_module), partitions and
buffers are DeepSpeed's, layers those of layer_memory.py. tests/parallel/test_memory_plan.py holds the sum against the
most that real ranks allocate.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import parts_of
from neomoba_dist.model.neobert import Head, recompute_of
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.layer_memory import Held, Tokens, block_memory, encoder_end_memory, head_memory
from neomoba_dist.train.muon import Matrix, buffer_elements, matrices_of
from neomoba_dist.train.optim import moments_of, parameter_groups

# DeepSpeed's own defaults (deepspeed/runtime/zero/config.py), in elements
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
PREFETCH_BUCKET, PERSISTENCE_THRESHOLD = 50_000_000, 100_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at one moment. buffers: of ZeRO's collectives and of what is computed just then."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of what DeepSpeed keeps of a rank's parameters, whatever the batch.

    own: gradients of this rank's partitions. buckets: of collectives, from the first backward pass to the last one.
    fetching: beside them while ZeRO-3 gathers weights. reduced: while a bucket is reduced. step: gradients of the
    largest partition, as the optimizer takes them, and what Muon gathers.
    """

    weights: int
    gradients: int
    own: int
    optimizer: int
    buckets: int
    fetching: int
    reduced: int
    step: int


class Group(NamedTuple):
    """Of the optimizer: whether of experts on other ranks too, the elements of every parameter, the number of moments,
    and the matrices that Muon makes whole, the largest first."""

    of_experts: bool
    sizes: list[int]
    moments: int
    matrices: list[Matrix]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Group":
        """One of `parameter_groups`."""
        parameters: list[nn.Parameter] = group["params"]
        parts = [part.shard for parameter in parameters for part in parts_of(parameter)]
        found = [matrix for spec in parts for matrix in matrices_of(spec)] if group.get("orthogonalised") else []
        sizes = [parameter.numel() for parameter in parameters]
        found.sort(key=lambda matrix: matrix.flops, reverse=True)
        return cls(bool(group.get("moe")), sizes, len(moments_of(group)), found)

    @property
    def axis(self) -> str:
        """Over which ZeRO cuts it."""
        return "expert_dp" if self.of_experts else "dp_cp"

    def partition(self, ranks: int, zero_stage: int) -> int:
        """Elements of it on each of these ranks, padding included."""
        if zero_stage == 3:
            return sum(-(-size // ranks) for size in self.sizes)
        return 2 * -(-sum(self.sizes) // (2 * ranks))


@dataclass(frozen=True)
class Stage:
    """What ranks at one place of tp, pp and ep hold, read once off their module, which may lie on the meta device.

    blocks: one of those that are alike, with the indices of all of them. head_rows: of the output matrix, 0 where there
    is none.
    """

    groups: list[Group]
    blocks: list[tuple[Block, list[int]]]
    head_rows: int

    @classmethod
    def of(cls, module: nn.Module, optimizer: str) -> "Stage":
        """Of a rank's part of the model."""
        groups = [Group.of(group) for group in parameter_groups(module.parameters(), 0.0, optimizer)]
        alike: dict[tuple[str, type, type], tuple[Block, list[int]]] = {}
        head_rows = 0
        for part in module.modules():
            if isinstance(part, Block):
                kind = part.attention.kind, type(part.mlp), type(part)
                alike.setdefault(kind, (part, []))[1].append(part.index)
            elif isinstance(part, Head):
                head_rows = len(part.weight)
        return cls(groups, list(alike.values()), head_rows)

    @property
    def num_blocks(self) -> int:
        """All of them."""
        return sum(len(indices) for _, indices in self.blocks)

    @property
    def block_elements(self) -> int:
        """Elements of their parameters."""
        return sum(len(indices) * sum(p.numel() for p in block.parameters()) for block, indices in self.blocks)


class Beside(NamedTuple):
    """Bytes that a teacher adds: weights, what is kept for the student's backward pass, what passes by then."""

    weights: int = 0
    kept: int = 0
    passing: int = 0


NO_TEACHER = Beside()


def plan_memory(config: Config, plan: BatchPlan, mesh: Mesh, stage: Stage, teacher: Beside = NO_TEACHER) -> RankMemory:
    """The most that the rank at `mesh` holds.

    At the start of an update's last backward pass, at its end or that of an earlier one, or in the optimizer's step.
    ConfigError for offload.
    """
    for key in ("offload_optimizer", "offload_param"):
        if config.deepspeed["zero_optimization"].get(key, {}).get("device", "none") != "none":
            raise ConfigError(f"{config.source}: a plan knows no offload; set zero_optimization.{key}.device to none")
    zero = zero_memory(config, mesh, stage)
    kept, passing = activation_memory(config, plan, mesh, stage)
    several = plan.gradient_accumulation_steps > 1
    graphs = graph_memory(config, mesh, stage)
    states = RankMemory(zero.weights + teacher.weights, zero.gradients, zero.optimizer, graphs, 0)
    backward = replace(
        states,
        gradients=zero.gradients if several or config.zero_stage == 3 else 0,
        activations=graphs + kept + teacher.kept,
        buffers=zero.buckets + zero.fetching + passing + teacher.passing,
    )
    waiting = waiting_memory(config, plan, mesh, stage)
    added = replace(states, gradients=zero.gradients + waiting, buffers=zero.buckets)
    # the sum of earlier micro-batches, where these are not added to it in float32 as they are reduced
    doubled = zero.own if several and config.zero_stage == 2 and not _adds_in_place(config) else 0
    # at stage 1 what is added to in place is made then, while gradients move into the buckets
    reduced = max(zero.reduced, zero.own) if config.zero_stage == 1 and _adds_in_place(config) else zero.reduced
    again = zero.buckets if mesh["pp"].size > 1 else 0  # DeepSpeed's pipeline makes another bucket, and leaves it empty
    end = replace(states, buffers=zero.buckets + again + reduced + doubled)
    step = replace(states, gradients=zero.own, buffers=zero.step)
    return max((backward, added, end, step), key=lambda moment: moment.total)


def zero_memory(config: Config, mesh: Mesh, stage: Stage) -> ZeroMemory:
    """See `ZeroMemory`."""
    zero, number = config.deepspeed["zero_optimization"], config.zero_stage
    element = 4 if config.dtype_name == "float32" else 2
    summed = 4 if config.gradient_dtype == "fp32" else 2
    sent = 4 if config.communication_dtype == "fp32" else 2
    elements = owned = largest = optimizer = fetching = 0
    for group in stage.groups:
        part = group.partition(mesh[group.axis].size, number)
        elements, owned, largest = elements + sum(group.sizes), owned + part, max(largest, part)
        optimizer += 4 * (1 + group.moments) * part
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    buckets = bucket * zero.get("contiguous_gradients", True) * (2 if _overlaps(config, mesh) else 1)
    # stage 1 fills it with the sums, stage 2 as `gradient_sums.average_in` has it
    buckets *= {1: summed, 2: max(element, sent)}.get(number, sent)
    step = matrix_memory(mesh, stage, number) + (0 if _adds_in_place(config) else 4 * largest)
    if number == 3:
        small = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        sizes = [size for group in stage.groups for size in group.sizes if size > small]
        # gathered weights stay until as many others have been used as may live, which is looked at before a layer's are
        # fetched; small ones stay in any case
        live = zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS) + max(sizes, default=0)
        buckets += element * (elements - sum(sizes) + min(sum(sizes), live))
        step += buckets
        # what is fetched together arrives in one tensor, rank by rank, and is copied from there
        fetching = element * min(sum(sizes), zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    return ZeroMemory(
        weights=element * (owned if number == 3 else elements),
        gradients=summed * (elements if number == 1 else owned),
        own=summed * owned,
        optimizer=optimizer,
        buckets=buckets,
        fetching=fetching,
        reduced=sent * min(elements, bucket),
        step=step,
    )


def matrix_memory(mesh: Mesh, stage: Stage, zero_stage: int) -> int:
    """Bytes that Muon holds beside a rank's partitions in the optimizer's step: whole matrices, and what it makes of
    them."""
    sizes = [0]
    for group in stage.groups:
        if group.matrices:
            ranks, tp = mesh[group.axis].size, mesh["tp"].size
            sizes.append(buffer_elements(group.matrices[0], group.partition(ranks, zero_stage), ranks, tp))
    return 4 * max(sizes)


def _adds_in_place(config: Config) -> bool:
    """Whether reduced gradients are added to one float32 tensor, which the optimizer then takes as it is."""
    return config.dtype_name != "float32" and config.gradient_dtype == "fp32" and config.zero_stage < 3


def graph_memory(config: Config, mesh: Mesh, stage: Stage) -> int:
    """Bytes of the memory of CUDA graphs (train/graphs.py), which nothing else can use: what blocks keep and hold in
    passing, and what goes into each and comes out, for every kind of step."""
    if not config.phase.cuda_graphs:
        return 0
    tokens, held = Tokens.of(config, mesh), blocks_memory(config, mesh, stage)
    kinds = 2 if 0 < config.phase.full_attention_fraction < 1 else 1
    hidden = tokens.element * tokens.between * config.model.hidden_size
    # an input, an output and their gradients; blocks keep the input of one kind without graphs, too
    states = stage.num_blocks * (4 * kinds - 1) * hidden
    return round(held.kept + held.passing) + states + kinds * tokens.element * stage.block_elements


def blocks_memory(config: Config, mesh: Mesh, stage: Stage) -> Held:
    """What the blocks of a stage keep of a micro-batch for its backward pass, and the most that one of these holds."""
    phase, kept, passing = config.phase, 0.0, 0.0
    for block, indices in stage.blocks:
        ways = Counter(recompute_of(index, phase.recompute, phase.recompute_every) for index in indices)
        for way, number in ways.items():
            held = block_memory(block, config, mesh, Tokens.of_block(block, config, mesh), way)
            kept, passing = kept + number * held.kept, max(passing, held.passing)
    return Held(kept, passing)


def waiting_memory(config: Config, plan: BatchPlan, mesh: Mesh, stage: Stage) -> int:
    """Bytes of a micro-batch's gradients at the end of its backward pass, where they wait for that to be added together
    (gradient_sums.py). Those that come out of CUDA graphs are among the memory of these."""
    if not (config.zero_stage == 1 and _adds_in_place(config) and config.compiled_on(mesh.device.type)):
        return 0
    if plan.gradient_accumulation_steps == 1 and _overlaps(config, mesh):
        return 0  # the last ones are reduced as they come
    elements = sum(sum(group.sizes) for group in stage.groups)
    return 2 * (elements - stage.block_elements if config.phase.cuda_graphs else elements)


def _overlaps(config: Config, mesh: Mesh) -> bool:
    """Whether gradients are reduced beside the backward pass, from two buckets. DeepSpeed never does in pipelines."""
    asked = config.deepspeed["zero_optimization"].get("overlap_comm", False)
    return bool(asked) and config.zero_stage < 3 and mesh["pp"].size == 1


def activation_memory(config: Config, plan: BatchPlan, mesh: Mesh, stage: Stage) -> tuple[int, int]:
    """Bytes that layers keep for backward passes, and the most that one of these holds beside them.

    A pipeline stage keeps as many micro-batches as there are stages from it on. Without blocks that run by graphs.
    """
    tokens, phase, pp = Tokens.of(config, mesh), config.phase, mesh["pp"]
    kept, passing = 0.0, 0.0
    if config.model.position_embedding == "rope":
        tables = 1 if config.model.sliding_rope_theta is None else 2
        kept += 4 * tokens.here * (config.model.head_dim or 0) * tables  # cos and sin of half a head's features
    if config.model.num_decoder_layers:
        encoder = Tokens.of(config, mesh, encoder=True)
        kept += encoder_end_memory(config, mesh)
        kept += 4 * encoder.here * (config.model.head_dim or 0) * (config.model.position_embedding == "rope")
        kept += encoder.between * config.model.hidden_size * (config.model.dropout > 0)
    if config.model.dropout and pp.index == 0:
        kept += tokens.between * config.model.hidden_size  # a byte each: which of the embedding are kept
    if not phase.cuda_graphs:
        of_blocks = blocks_memory(config, mesh, stage)
        kept, passing = kept + of_blocks.kept, of_blocks.passing
    if pp.size > 1:
        output = tokens.element * tokens.between * config.model.hidden_size
        kept = (kept + output) * min(pp.size - pp.index, plan.gradient_accumulation_steps)
    if stage.head_rows:
        head = head_memory(stage.head_rows, config, mesh, tokens)
        kept, passing = kept + head.kept, max(passing, head.passing)
    return round(kept), round(passing)
