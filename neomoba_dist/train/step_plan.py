"""What a step of a layout moves and how long it takes, from stated rates: nothing here has been measured.

Bytes are those that a rank receives, as the communication ledger counts them (parallel/ledger.py), by ring algorithms:
an all-gather or a reduce-scatter of n bytes over d ranks brings (d - 1) / d n, an all-reduce twice that. Compute and
communication are taken not to overlap.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.config.span_corruption import decoder_tokens, encoder_tokens
from neomoba_dist.model.block import Block
from neomoba_dist.model.encoder_decoder import DecoderBlock
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.parallel.context_cost import AttentionShape, received_bytes
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import step_flops
from neomoba_dist.train.layer_memory import Tokens, attention_strategy
from neomoba_dist.train.memory_plan import Stage
from neomoba_dist.train.muon import busiest_flops

# tokens per second of phase 1 whose layers are not compiled, of those of compiled ones, measured on an H100
# (docs/benchmarks.md)
UNCOMPILED = 108_600 / 133_100


@dataclass(frozen=True)
class Machine:
    """Stated rates. peak: FLOP/s of a GPU in the compute dtype; share: of it that compiled layers reach; nvlink,
    network: bytes per second that a GPU receives from its own machine and from others; tf32, float32: FLOP/s of float32
    products, for the former in TF32. Defaults: H100 SXM, 400 Gbit/s per GPU."""

    gpus: int = 8
    peak: float = 989e12
    tf32: float = 495e12
    float32: float = 67e12
    share: float = 0.5
    nvlink: float = 450e9
    network: float = 50e9


@dataclass(frozen=True)
class StepPlan:
    """flops: of the whole update, as MFU counts them; teacher_flops: of a teacher, beside them. received: bytes of the
    busiest kind of rank, by axis. compute, communication: seconds without waiting; muon_flops, muon: operations and
    seconds of the rank that has most matrices to make orthogonal, beside `flops` and `compute`; bubble: share of the
    step in which a pipeline stage waits; seconds: of the step.
    """

    flops: float
    teacher_flops: float
    muon_flops: int
    muon: float
    received: Mapping[str, float]
    compute: float
    communication: Mapping[str, float]
    bubble: float
    seconds: float
    mfu: float


def update_flops(config: Config, plan: BatchPlan) -> float:
    """Operations of an update whose rows are one document each, the mean over the phase's full and sparse steps."""
    length, fraction = config.phase.sequence_length, config.phase.full_attention_fraction
    counted, row, encoder, rows = counted_tokens(config), torch.tensor([length]), None, plan.rows_per_update
    if config.model.num_decoder_layers:
        row, encoder = torch.tensor([counted]), torch.tensor([encoder_tokens(length)])
    return rows * sum(
        part * step_flops(config.model, row, counted, full, encoder)
        for part, full in ((1 - fraction, False), (fraction, True))
        if part
    )


def counted_tokens(config: Config) -> int:
    """Of a row, those that enter the loss."""
    length = config.phase.sequence_length
    if config.model.num_decoder_layers:
        return decoder_tokens(length)
    return length if config.model.causal else round(length * config.data.mlm_probability)


def plan_step(
    config: Config, plan: BatchPlan, mesh: Mesh, stage: Stage, machine: Machine, flops: float, teacher_flops: float = 0
) -> StepPlan:
    """A step of the rank at `mesh`; that of a stage with most blocks is the slowest. flops: see `update_flops`."""
    micro_batches, pp = plan.gradient_accumulation_steps, mesh["pp"].size
    again = {"none": 0.0, "selective": 0.0, "full": 1 / 3 / config.phase.recompute_every}[config.phase.recompute]
    share = stage.num_blocks * pp / config.model.num_layers  # 1, but for stages with more blocks than others
    reached = machine.peak * machine.share * (1 if config.compiled_on("cuda") else UNCOMPILED)
    compute = (flops * (1 + again) + teacher_flops) * share / plan.world_size / reached
    received = Counter(layer_bytes(config, mesh, stage, micro_batches))
    received.update(zero_bytes(config, mesh, stage, micro_batches))
    received.update(matrix_bytes(mesh, stage))
    seconds = {axis: moved / rate(mesh, axis, machine) for axis, moved in received.items()}
    reduction = sum(seconds[axis] for axis in ("dp_cp", "expert_dp"))
    slots = micro_batches + pp - 1
    orthogonalised = muon_flops(mesh, stage)
    muon = orthogonalised / (machine.share * (machine.tf32 if config.phase.allow_tf32 else machine.float32))
    step = (compute + sum(seconds.values()) - reduction) * slots / micro_batches + reduction + muon
    return StepPlan(
        flops=flops,
        teacher_flops=teacher_flops,
        muon_flops=orthogonalised,
        muon=muon,
        received=dict(received),
        compute=compute,
        communication=seconds,
        bubble=(pp - 1) / slots,
        seconds=step,
        mfu=flops / (step * plan.world_size * machine.peak),
    )


def rate(mesh: Mesh, axis: str, machine: Machine) -> float:
    """Bytes per second that a rank receives along an axis: all ranks of a machine share its network."""
    machines = Counter(rank // machine.gpus for rank in mesh[axis].ranks)
    return machine.nvlink if len(machines) == 1 else min(machine.nvlink, machine.network * min(machines.values()))


def layer_bytes(config: Config, mesh: Mesh, stage: Stage, micro_batches: int) -> dict[str, float]:
    """What the layers' own communication brings to a rank in a step, by axis."""
    tokens, model, phase = Tokens.of(config, mesh), config.model, config.phase
    tp, ep, pp = (mesh[axis].size for axis in ("tp", "ep", "pp"))
    hidden = tokens.element * model.hidden_size
    forward = 1 + 1 / phase.recompute_every if phase.recompute == "full" else 1
    passed = sum(len(indices) * passed_tokens(block, config, mesh, forward) for block, indices in stage.blocks)
    passed += 2 * tokens.here * (1 + (pp == 1))  # the embedding's sum, and the head's where it is here too
    if model.num_decoder_layers:
        passed += 2 * Tokens.of(config, mesh, encoder=True).here
    rows = tokens.between * model.num_experts_per_tok * 2 * (forward + 1)
    mixtures = sum(len(indices) for block, indices in stage.blocks if isinstance(block.mlp, MoE))
    exchanged = sum(len(indices) * exchange_bytes(block, config, mesh, tokens) for block, indices in stage.blocks)
    received = {
        "tp": hidden * passed * (tp - 1) / tp,
        "cp": exchanged,
        "ep": hidden * rows * (ep - 1) / ep * mixtures,
        "pp": hidden * tokens.between * min(pp - 1, 2),
    }
    return {axis: moved * micro_batches for axis, moved in received.items()}


def passed_tokens(block: Block, config: Config, mesh: Mesh, forward: float) -> float:
    """Tokens whose states a block's gathers and scatters bring over tp in a micro-batch. forward: passes, recomputed
    ones too.

    Of each of its layers: without sequence parallelism an all-reduce each way; with it gathers and scatters, the
    gathers once more.
    """
    again = mesh.sequence_parallel
    each = 2 * forward + 2 + again
    if not isinstance(block, DecoderBlock):
        return 2 * each * Tokens.of_block(block, config, mesh).here
    memory = Tokens.of(config, mesh, encoder=True).here * (forward + 2 if again else 2)
    return 3 * each * Tokens.of_block(block, config, mesh).here + memory


def exchange_bytes(block: Block, config: Config, mesh: Mesh, tokens: Tokens) -> float:
    """What context parallelism brings to a rank in one block and micro-batch, the mean over the phase's steps."""
    shape, fraction, total = AttentionShape.of(config), config.phase.full_attention_fraction, 0.0
    if mesh["cp"].size == 1:
        return total
    for kind, part in ((block.attention.kind, 1 - fraction), ("full", fraction)):
        strategy = attention_strategy(kind, config, shape, tokens.here)
        forward, backward = received_bytes(strategy, shape, tokens.here, mesh["cp"].size)
        total += part * (forward * (1 if config.phase.recompute == "none" else 2) + backward)
    return total


def zero_bytes(config: Config, mesh: Mesh, stage: Stage, micro_batches: int) -> dict[str, float]:
    """What ZeRO brings to a rank in a step: gradients, and weights.

    Stage 1 reduces once in an update, the others for every micro-batch; stages 1 and 2 by all-reduces.
    """
    received = {}
    for axis in ("dp_cp", "expert_dp"):
        size = sum(sum(group.sizes) for group in stage.groups if group.of_experts == (axis == "expert_dp"))
        parts = size * (mesh[axis].size - 1) / mesh[axis].size
        weights = Tokens.of(config, mesh).element * parts
        gradients = (4 if config.communication_dtype == "fp32" else 2) * parts
        received[axis] = {
            1: weights + 2 * gradients,
            2: weights + 2 * micro_batches * gradients,
            3: micro_batches * (2 * weights + gradients),
        }[config.zero_stage]
    return received


def muon_flops(mesh: Mesh, stage: Stage) -> int:
    """What the rank with most matrices to make orthogonal computes in a step, 0 without Muon."""
    tp = mesh["tp"].size
    return sum(busiest_flops(group.matrices, mesh[group.axis].size, tp) for group in stage.groups)


def matrix_bytes(mesh: Mesh, stage: Stage) -> dict[str, float]:
    """What Muon brings to a rank in a step, the mean over the ranks: its matrices whole, and their pieces back."""
    received, tp = {"tp": 0.0, "dp_cp": 0.0, "expert_dp": 0.0}, mesh["tp"].size
    for group in stage.groups:
        if group.matrices:
            ranks = mesh[group.axis].size
            both_ways = 2 * 4 * sum(group.sizes) / ranks
            received[group.axis] += both_ways * (ranks - 1) / ranks
            received["tp"] += both_ways * (tp - 1) / tp
    return received
