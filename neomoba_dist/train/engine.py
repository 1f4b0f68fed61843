"""What the training loop and checkpoints see of DeepSpeed: one interface, behind which engines.py has two engines.

Loss = sum over the valid tokens of the whole update / num_valid. DeepSpeed averages over micro-batches and over the
dp x cp ranks, so each micro-batch's sum is multiplied by their number before it is divided by num_valid.
"""

import logging
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from neomoba_dist.checkpoint.layout import KINDS, AgreedCheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader, load_buffers
from neomoba_dist.checkpoint.resume import read_together
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.init import draw_range
from neomoba_dist.model.moe.layer import moe_layers, saved_buffers
from neomoba_dist.parallel.comm import all_reduce, sum_together
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import DeepSpeedMPU, Mesh
from neomoba_dist.train.bad_steps import guard_step
from neomoba_dist.train.compiled import compile_layers, is_compiled
from neomoba_dist.train.drawn import WritePart, WrittenOneByOne
from neomoba_dist.train.expert_groups import check_rows, declare_experts, update_biases
from neomoba_dist.train.fragments import Fragment, flat_partitions, fragments, is_copy, partition_groups
from neomoba_dist.train.gradient_sums import add_in_place, average_in
from neomoba_dist.train.heap import keep_freed_memory
from neomoba_dist.train.layer_stats import GradientNorms, LayerStatistics
from neomoba_dist.train.losses import LOSSES, means
from neomoba_dist.train.optim import build_optimizer, moments_of
from neomoba_dist.train.recompute import choose_recompute
from neomoba_dist.train.stragglers import ForwardTimer

# DeepSpeed compiles a shared-memory operator at start on a CPU machine (40-150 s that look like a hang, and a killed
# build leaves a lock that hangs every later run). Training never uses it.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
# At ZeRO-1 DeepSpeed leaves its own ZeRO optimizer, which adds gradients up in float32 when told to, for another one
# under which copies of a weight drift apart. Every engine here has ZeRO.
deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION


LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes of DeepSpeed's

Judge = Callable[[float, float], str | None]
Report = Callable[[], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class UpdateResult:
    """One update: mean token loss and auxiliary loss, gradient norm before clipping; the same on every rank.

    problem: why no optimizer step was taken, in words; None if it was. overflow: none was taken because fp16's loss
    scale was too high, which is how it is found. routing, activation_rms: see layer_stats.LayerStatistics.read.
    layer_grad_norms: of every layer, then of the rest. report: sums over the world of what `Engine.update` was given.
    parts: what the loss is made of, by name, where an engine names any; means, before their weights.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    problem: str | None
    overflow: bool
    routing: torch.Tensor | None
    activation_rms: list[float]
    layer_grad_norms: list[float]
    report: Mapping[str, list[float]]
    parts: Mapping[str, float]


def not_finite(loss: float, grad_norm: float) -> str | None:
    """The least that a judge objects to."""
    return None if math.isfinite(loss) and math.isfinite(grad_norm) else f"loss {loss}, gradient norm {grad_norm}"


class Engine(ABC):
    """What the training loop and checkpoints need. `module` is this rank's part of the model."""

    PARTS: tuple[str, ...] = ()  # of the loss, for the log, beside those that the model's own losses have

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh) -> None:
        config = choose_recompute(config, mesh)
        self.config, self.plan, self.mesh, self.step = config, plan, mesh, 0
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._aux_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.losses = LOSSES[config.model.next_sentence_prediction and config.finetune.head is None]()
        self.parts = self.PARTS + self.losses.PARTS
        self._part_sums = torch.zeros(len(self.parts), dtype=torch.float64, device=mesh.device)
        if config.dtype_name == "float16" and mesh.device.type == "cpu":
            raise ConfigError("fp16.enabled: DeepSpeed has no fp16 on a CPU; set bf16.enabled instead, or neither")
        check_rows(config, mesh)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.phase.allow_tf32
        torch.use_deterministic_algorithms(config.phase.deterministic, warn_only=True)
        if mesh.device.type == "cpu":
            keep_freed_memory()
        _start_deepspeed(mesh)
        self.module = self._build_module()
        self.layer_statistics = LayerStatistics(self.module, config.model, mesh)
        self.forward_timer = ForwardTimer(self.module, mesh)
        self.compiled = is_compiled(config, mesh)
        if self.compiled:
            compile_layers(self.module)
        declare_experts(self.module, mesh, config.zero_stage, DeepSpeedMoE, deepspeed_groups)
        self.optimizer = build_optimizer(self.module, config.phase, mesh, self.fragments)
        if config.zero_stage == 3:
            self._cut(self.module, draw_range)
        self.engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            config=self._deepspeed_config(),
            mpu=self._mpu(),
        )
        if config.zero_stage == 2:
            dtypes = getattr(torch, config.dtype_name), self.engine.communication_data_type
            average_in(torch.promote_types(*dtypes), self.engine.optimizer)
        if config.zero_stage == 1:
            add_in_place(self.engine.optimizer, together=self.compiled)
        self.gradient_norms = GradientNorms(
            self.engine.optimizer, config.zero_stage, self.module, config.model.num_layers, mesh
        )
        self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # fp16: the judge sees to it
        self._judge: Judge = not_finite
        self._report: Report = dict
        self._num_valid = self._micro_batches = 0
        self._part_counts: list[int] = []
        self._result: UpdateResult | None = None
        guard_step(self.engine.optimizer, self.optimizer, self._decide)

    def update(
        self, batches: Sequence[Batch], learning_rate: float, judge: Judge = not_finite, report: Report = dict
    ) -> UpdateResult:
        """One optimizer step over this rank's micro-batches of the update.

        judge: (loss, gradient norm) -> why the step must not be taken, if so; asked on all ranks with the same numbers.
        report: numbers to add up over the world, on the way in the one collective that brings those two together;
        called before it, when forward and backward are done (on a GPU: under way).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.train()
        self._loss_sum.zero_()
        self._aux_sum.zero_()
        self._part_sums.zero_()
        self._judge, self._report = judge, report
        self._num_valid, self._micro_batches = batches[0].num_valid, len(batches)
        self._part_counts = [self._num_valid] * len(self.PARTS) + [*self.losses.counts(batches[0])]
        self._run_update(batches)
        result = self._result
        assert result is not None
        if self.engine.optimizer.overflow and not (result.problem or result.overflow):  # its squares, in float32
            result = replace(result, problem=f"the gradient norm {result.grad_norm:.4g} is too large")
        if result.routing is not None and not (result.problem or result.overflow):
            update_biases(self.module, result.routing.to(self.mesh.device), self.config.model)
        return result

    def _decide(self) -> tuple[bool, float]:
        """Add up all numbers of the update over the world, and ask the judge; whether AdamW may step, gradient norm."""
        squares = self.gradient_norms.squares()
        # tensor-parallel ranks have the same loss, and only last pipeline stages have one
        losses = torch.stack([self._loss_sum, self._aux_sum])
        damage = torch.stack([~torch.isfinite(losses).all(), ~torch.isfinite(squares).all()])
        parts: dict[str, torch.Tensor | Sequence[float]] = {
            "losses": losses if self.mesh["tp"].index == 0 else torch.zeros_like(losses),
            "parts": self._part_sums if self.mesh["tp"].index == 0 else torch.zeros_like(self._part_sums),
            "damage": damage,
            "squares": squares[:-1],
            "statistics": self.layer_statistics.take(),
        }
        sums = sum_together({**parts, **self._report()}, self.mesh)
        loss_sum, aux_sum = sums["losses"].tolist()
        bad_losses, bad_squares = sums["damage"].tolist()  # also where another rank's are summed
        loss = math.nan if bad_losses else loss_sum / self._num_valid
        layer_squares = sums["squares"].tolist()
        grad_norm = math.nan if bad_squares else math.sqrt(math.fsum(layer_squares))
        activation_rms, routing = self.layer_statistics.read(sums["statistics"])
        scaler = self.engine.optimizer.loss_scaler
        can_fall = scaler.dynamic and scaler.cur_scale > scaler.min_scale
        overflow = can_fall and math.isfinite(loss) and not math.isfinite(grad_norm)
        self._result = UpdateResult(
            loss=loss,
            aux_loss=aux_sum / (self._micro_batches * self.mesh["dp_cp"].size),
            grad_norm=grad_norm,
            problem=None if overflow else self._judge(loss, grad_norm),
            overflow=overflow,
            routing=routing,
            activation_rms=activation_rms,
            layer_grad_norms=[math.sqrt(square) for square in layer_squares],
            report={name: sums[name].tolist() for name in sums.keys() - parts.keys()},
            parts=means(self.parts, sums["parts"].tolist(), self._part_counts),
        )
        return self._result.problem is None and not overflow, grad_norm

    def rehearse(self, batches: Sequence[Batch]) -> None:
        """Everything of an update but AdamW's step; its moments are made, and all else is as before."""
        if not self._optimizer_states():
            self._create_moments(0.0)
        scaler = vars(self.engine.optimizer.loss_scaler)
        kept = dict(scaler)
        self.update(batches, 0.0, judge=lambda loss, grad_norm: "it is only rehearsed")
        scaler.update(kept)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Loss over the micro-batches of all ranks, without gradients, and the parts that the model's own losses have.

        batches: `num_valid` and `num_pairs` are those of all of them.
        """
        self.module.eval()
        self._loss_sum.zero_()
        self._part_sums.zero_()
        with torch.no_grad():
            self._run_evaluation(batches)
        own = self._part_sums[len(self.PARTS) :]
        loss, *parts = self._global_sum(torch.cat((self._loss_sum[None], own)))
        counts = self.losses.counts(batches[0])
        return loss / batches[0].num_valid, means(self.losses.PARTS, parts, counts)

    def set_full_attention(self, full: bool) -> None:
        """Switch the MoBA layers to full attention or back."""
        set_full_attention(self.module, full)

    def set_step(self, step: int) -> None:
        """Number of the update to come: what the routers' jitter and dropout's masks are drawn from."""
        self.step = step
        for layer in moe_layers(self.module):
            layer.router.set_step(step)

    def before_step(self, action: Callable[[], None]) -> None:
        """Have `action` called each time that AdamW is about to change weights and moments."""
        self.optimizer.register_step_pre_hook(lambda *unused: action())

    def local_state(self) -> Iterator[StateFragment]:
        """What this rank adds to a checkpoint: its own parts of weights and moments, where no other rank saves them."""
        if not self._optimizer_states():
            self._create_moments(0.0)
        for fragment in self.fragments():
            if is_copy(fragment.parameter, self.mesh) or not fragment.valid:
                continue
            yield self._state_of(fragment, self._kinds(fragment))
        if self.mesh["dp_cp"].index == self.mesh["tp"].index == 0:
            for spec, buffer in saved_buffers(self.module):
                yield StateFragment(spec, 0, {KINDS[0]: buffer.flatten()})

    def load(self, reader: CheckpointReader, *, moments: bool) -> None:
        """Take weights, and with `moments` the state of the optimizer, from a checkpoint of any layout.

        A rank reads its own parts of the float32 partitions, 12 bytes per parameter over all ranks. Below ZeRO-3 it
        gets the weights that it computes with from the partitions of its peers, as after every optimizer step.
        Raises AgreedDamageError on all ranks where a file is not what the manifest says; another one can be loaded
        then, and must be: weights and moments hold anything. Raises AgreedCheckpointError where the moments are those
        of another optimizer.
        """
        if moments:
            if (wrote := reader.config.phase.optimizer) != self.config.phase.optimizer:
                raise AgreedCheckpointError(
                    f"{reader.folder}: holds the moments of {wrote}, and neomoba.phase.optimizer is "
                    f"{self.config.phase.optimizer}; set it to {wrote}, or start from the weights with --init_from"
                )
            state = reader.trainer()
            self._create_moments(float(state["optimizer_step"]))
            self.load_loss_scaler(state)
        wanted = KINDS if moments else KINDS[:1]
        held = [(fragment, self._kinds(fragment) if moments else wanted) for fragment in self.fragments()]

        def read() -> None:
            checksums = reader.checksums(wanted, (self.mesh.rank, self.mesh["world"].size))
            reader.fill([self._state_of(fragment, kinds) for fragment, kinds in held], checksums)
            load_buffers(reader, self.module)

        read_together(self.mesh, read)
        for fragment, kinds in held:
            for kind in kinds:
                self.values(fragment, kind)[fragment.valid :].zero_()  # padding
            if self.config.zero_stage == 3:
                parameter: Any = fragment.parameter
                held_here = parameter.ds_tensor
                first = fragment.part.first + fragment.start - held_here.ds_numel * parameter.ds_zero_partition_rank
                held_here.data.narrow(0, first, fragment.numel).copy_(self.values(fragment, KINDS[0]))
        if self.config.zero_stage == 3:
            # the second copy of the weights (zero_hpz_partition_size) is stale now
            self.engine.optimizer.invalidate_secondary_tensor()
        else:
            self.engine.optimizer.update_lp_params()

    def _state_of(self, fragment: Fragment, kinds: Sequence[str]) -> StateFragment:
        """The fragment's tensors, without padding; views of the partitions."""
        values = {kind: self.values(fragment, kind)[: fragment.valid] for kind in kinds}
        return StateFragment(fragment.shard, fragment.start, values)

    def _kinds(self, fragment: Fragment) -> tuple[str, ...]:
        """Of what is saved of a fragment; the moments exist."""
        state = self.engine.optimizer.optimizer.state[fragment.flat]
        return tuple(kind for kind in KINDS if kind == KINDS[0] or kind in state)

    def fragments(self) -> Iterator[Fragment]:
        """Where this rank's optimizer holds its parts of the parameters."""
        return fragments(self.module.parameters(), self.engine.optimizer, self.config.zero_stage, self.mesh)

    def values(self, fragment: Fragment, kind: str) -> torch.Tensor:
        """The fp32 weights ("model") or a moment of a fragment, a view of the partition."""
        flat = fragment.flat if kind == KINDS[0] else self.engine.optimizer.optimizer.state[fragment.flat][kind]
        return flat.detach().narrow(0, fragment.offset, fragment.numel)

    def optimizer_step(self) -> int:
        """Number of steps that the optimizer has taken (fp16 overflows take none)."""
        return int(max((float(state["step"]) for state in self._optimizer_states()), default=0))

    def loss_scale(self) -> float:
        """fp16: the dynamic loss scale; 1 otherwise."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def loss_scaler(self) -> dict[str, float]:
        """fp16: the dynamic loss scale and the counters that say when it changes next; empty otherwise."""
        scaler = self.engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALER} if scaler.dynamic else {}

    def load_loss_scaler(self, state: Mapping[str, Any]) -> None:
        """Go on with that of trainer.json; checkpoints of earlier versions have the scale alone."""
        scaler = self.engine.optimizer.loss_scaler
        if scaler.dynamic:
            vars(scaler).update(state.get("loss_scaler", {"cur_scale": state["loss_scale"]}))

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The states of the optimizer, one per flat fp32 partition that DeepSpeed made."""
        return [state for state in self.engine.optimizer.optimizer.state.values() if "step" in state]

    def _create_moments(self, step: float) -> None:
        """The optimizer makes its state at the first step; a resumed run needs it before."""
        zero, stage = self.engine.optimizer, self.config.zero_stage
        for flat, group in zip(flat_partitions(zero, stage), partition_groups(zero, stage), strict=True):
            moments = {kind: torch.zeros_like(flat) for kind in moments_of(group)}
            zero.optimizer.state[flat] = {"step": torch.tensor(step, device=flat.device), **moments}

    def _local(self, batch: Batch) -> Batch:
        """This rank's share of a batch, on its device, with the tokens whose losses are computed."""
        return local_share(batch, self.mesh, self.config.model).with_counted().to(self.mesh.device)

    def scale(self, num_valid: int, micro_batches: int) -> float:
        """Factor that undoes DeepSpeed's averages and turns a sum of token losses into our mean."""
        return micro_batches * self.mesh["dp_cp"].size / num_valid

    def _add(self, loss_sum: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Take a micro-batch's loss and its parts down for the log; the loss. See `losses.TokenLoss.total`."""
        self._loss_sum += loss_sum.detach()
        self._part_sums[len(self.PARTS) :] += parts
        return loss_sum

    def _global_sum(self, values: torch.Tensor) -> list[float]:
        # only last pipeline stages have a loss; the other stages add zeros
        return all_reduce(all_reduce(values, self.mesh, "dp_cp"), self.mesh, "pp").tolist()

    def _deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's part of the configuration with what we own filled in."""
        settings = {key: value for key, value in self.config.deepspeed.items() if key != "train_batch_size"}
        settings["gradient_accumulation_steps"] = self.plan.gradient_accumulation_steps
        settings["data_types"] = {"grad_accum_dtype": self.config.gradient_dtype}
        settings["communication_data_type"] = self.config.communication_dtype
        settings["zero_force_ds_cpu_optimizer"] = False
        settings.setdefault("steps_per_print", sys.maxsize)  # our run log has a line per step
        # these two would have the host wait for the device: with every micro-batch, and for every parameter in a step
        settings.setdefault("timers", {"throughput": {"enabled": False}})
        if "bf16" in settings:
            settings["bf16"] = {"check_grad_overflow": False, **settings["bf16"]}  # our judge sees to it
        return settings

    def _cut(self, module: nn.Module, write: WritePart) -> None:
        """ZeRO-3: leave on this rank its part of every parameter of a deferred module, which `write` fills."""
        mpu = self._mpu()
        deepspeed.zero.Init(
            module=WrittenOneByOne(module, getattr(torch, self.config.dtype_name), write),
            data_parallel_group=mpu and mpu.get_data_parallel_group(),
            config_dict_or_path=self._deepspeed_config(),
            mpu=mpu,
        )

    def cut_frozen(self, module: nn.Module, write: WritePart) -> object:
        """The same of a module that is not trained. Its layers gather their weights when they run, for as long as what
        is returned lives."""
        self._cut(module, write)
        return deepspeed.initialize(model=module, config=self._deepspeed_config(), mpu=self._mpu())[0]

    @abstractmethod
    def _build_module(self) -> nn.Module:
        """This rank's part of the model, on its device."""

    @abstractmethod
    def _mpu(self) -> DeepSpeedMPU | None:
        """What DeepSpeed is told of the layout."""

    @abstractmethod
    def _run_update(self, batches: Sequence[Batch]) -> None:
        """Forward, backward and step; adds to `_loss_sum`, `_part_sums` and `_aux_sum`."""

    @abstractmethod
    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        """Forward; adds to `_loss_sum` and `_part_sums`."""


def _start_deepspeed(mesh: Mesh) -> None:
    """Let DeepSpeed adopt our process group, and keep its many start-up lines out of the run log."""
    deepspeed_logger.setLevel(logging.WARNING)
    # torch renamed two collectives that DeepSpeed still calls by their old names, which work
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # PipelineModule broadcasts tied weights once at start; torch warns as if it happened in the forward pass
    warnings.filterwarnings("ignore", message=".*c10d::broadcast_: an autograd kernel was not registered")
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
