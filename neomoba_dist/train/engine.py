"""The two engines behind one interface: DeepSpeed's (pp = 1, ZeRO 1-3) and its pipeline engine (pp > 1, ZeRO-1).

Loss = sum over the valid tokens of the whole update / num_valid. DeepSpeed averages over micro-batches and over the
dp x cp ranks, so each micro-batch's sum is multiplied by their number before it is divided by num_valid.
"""

import logging
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.checkpoint.load import CheckpointReader, load_buffers, load_weights
from neomoba_dist.checkpoint.save import StateFragment
from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.moe.layer import moe_layers, saved_buffers
from neomoba_dist.model.neobert import NeoBERT, layer_list, token_losses
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import DeepSpeedMPU, Mesh
from neomoba_dist.parallel.pipeline import PIPELINE_SETTINGS, build_pipeline
from neomoba_dist.train.expert_groups import check_rows, declare_experts, update_biases
from neomoba_dist.train.fragments import Fragment, flat_partitions, fragments, is_copy
from neomoba_dist.train.guard import code_fingerprint
from neomoba_dist.train.layer_stats import GradientNorms, LayerStatistics
from neomoba_dist.train.optim import build_optimizer

# DeepSpeed compiles a shared-memory operator at start on a CPU machine (40-150 s that look like a hang, and a killed
# build leaves a lock that hangs every later run). Training never uses it.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: mean token loss and auxiliary loss over the update, gradient norm before clipping.

    skipped: fp16's loss scale overflowed and no step was taken. routing, activation_rms: see
    layer_stats.LayerStatistics.take. layer_grad_norms: of every layer, then of the rest.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    skipped: bool
    routing: torch.Tensor | None
    activation_rms: list[float]
    layer_grad_norms: list[float]


class Engine(ABC):
    """What the training loop and checkpoints need. `module` is this rank's part of the model."""

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh) -> None:
        self.config, self.plan, self.mesh = config, plan, mesh
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._aux_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        if config.dtype_name == "float16" and mesh.device.type == "cpu":
            raise ConfigError("fp16.enabled: DeepSpeed has no fp16 on a CPU; set bf16.enabled instead, or neither")
        check_rows(config, mesh)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.phase.allow_tf32
        _start_deepspeed(mesh)
        self.module = self._build_module()
        self.layer_statistics = LayerStatistics(self.module, config.model, mesh)
        if config.phase.compile:
            # torch's cache on disk knows the operators by name: a graph from before one changed would run, and be wrong
            torch.compiler.config.cache_key_tag = code_fingerprint()
            for layer in self.module.modules():
                if type(layer).__name__ == "Block":
                    layer.compile(dynamic=False)
        declare_experts(self.module, mesh, config.zero_stage, DeepSpeedMoE, deepspeed_groups)
        self.optimizer = build_optimizer(self.module, config.phase)
        self.engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            config=self._deepspeed_config(),
            mpu=self._mpu(),
        )
        self.gradient_norms = GradientNorms(
            self.optimizer,
            self.engine.optimizer,
            config.zero_stage,
            self.module,
            config.model.num_hidden_layers,
            mesh,
        )

    def update(self, batches: Sequence[Batch], learning_rate: float) -> UpdateResult:
        """One optimizer step over this rank's micro-batches of the update."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.train()
        self._loss_sum.zero_()
        self._aux_sum.zero_()
        self._run_update(batches)
        micro_batches = len(batches) * self.mesh["dp_cp"].size
        # DeepSpeed skips a step whose gradients are not finite, in every dtype; only for fp16 that is routine
        overflow, fp16 = bool(self.engine.optimizer.overflow), self.config.dtype_name == "float16"
        grad_norm = math.nan if overflow else float(self.engine.get_global_grad_norm() or 0.0)
        activation_rms, routing = self.layer_statistics.take()
        if routing is not None and not overflow:
            update_biases(self.module, routing, self.config.model)
        return UpdateResult(
            loss=self._global_sum(self._loss_sum) / batches[0].num_valid,
            aux_loss=self._global_sum(self._aux_sum) / micro_batches,
            grad_norm=grad_norm,
            skipped=overflow and fp16,
            routing=routing,
            activation_rms=activation_rms,
            layer_grad_norms=self.gradient_norms.take(grad_norm, self.config.gradient_clipping),
        )

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum of the token losses over the micro-batches of all ranks, without gradients."""
        self.module.eval()
        self._loss_sum.zero_()
        with torch.no_grad():
            self._run_evaluation(batches)
        return self._global_sum(self._loss_sum)

    def set_full_attention(self, full: bool) -> None:
        """Switch the MoBA layers to full attention or back."""
        set_full_attention(self.module, full)

    def set_step(self, step: int) -> None:
        """Number of the update to come: what the routers' jitter is drawn from."""
        for layer in moe_layers(self.module):
            layer.router.set_step(step)

    def local_state(self) -> Iterator[StateFragment]:
        """What this rank adds to a checkpoint: its own parts of weights and moments, where no other rank saves them."""
        if not self._adam_states():
            self._create_moments(0.0)
        for fragment in self.fragments():
            if is_copy(fragment.parameter, self.mesh) or not fragment.valid:
                continue
            values = {kind: self.values(fragment, kind)[: fragment.valid] for kind in KINDS}
            yield StateFragment(shard_of(fragment.parameter), fragment.start, values)
        if self.mesh["dp_cp"].index == self.mesh["tp"].index == 0:
            for spec, buffer in saved_buffers(self.module):
                yield StateFragment(spec, 0, {KINDS[0]: buffer.flatten()})

    def load(self, reader: CheckpointReader, *, moments: bool) -> None:
        """Take weights, and with `moments` the state of AdamW, from a checkpoint of any layout.

        A rank reads its own parts of the float32 partitions, and below ZeRO-3 the weights that it computes with.
        """
        if moments:
            state = reader.trainer()
            self._create_moments(float(state["optimizer_step"]))
            if self.config.dtype_name == "float16":
                self.engine.optimizer.loss_scaler.cur_scale = state["loss_scale"]
        for fragment in self.fragments():
            spec, stop = shard_of(fragment.parameter), fragment.start + fragment.valid
            for kind in KINDS if moments else KINDS[:1]:
                values = self.values(fragment, kind).zero_()  # padding is zero
                values[: fragment.valid].copy_(reader.read_range(kind, spec, fragment.start, stop))
            if self.config.zero_stage == 3:
                part: Any = fragment.parameter
                part.ds_tensor.data.copy_(self.values(fragment, KINDS[0]))
        if self.config.zero_stage == 3:
            # the second copy of the weights (zero_hpz_partition_size) is stale now
            self.engine.optimizer.invalidate_secondary_tensor()
            load_buffers(reader, self.module)
        else:
            load_weights(reader, self.module)

    def fragments(self) -> Iterator[Fragment]:
        """Where this rank's optimizer holds its parts of the parameters."""
        return fragments(self.module.parameters(), self.engine.optimizer, self.config.zero_stage, self.mesh)

    def values(self, fragment: Fragment, kind: str) -> torch.Tensor:
        """The fp32 weights ("model") or a moment of a fragment, a view of the partition."""
        flat = fragment.flat if kind == KINDS[0] else self.engine.optimizer.optimizer.state[fragment.flat][kind]
        return flat.detach().narrow(0, fragment.offset, fragment.numel)

    def optimizer_step(self) -> int:
        """Number of steps that AdamW has taken (fp16 overflows take none)."""
        return int(max((float(state["step"]) for state in self._adam_states()), default=0))

    def loss_scale(self) -> float:
        """fp16: the dynamic loss scale; 1 otherwise."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def _adam_states(self) -> list[dict[str, Any]]:
        """The states of AdamW, one per flat fp32 partition that DeepSpeed made."""
        return [state for state in self.engine.optimizer.optimizer.state.values() if "step" in state]

    def _create_moments(self, step: float) -> None:
        """AdamW makes its state at the first step; a resumed run needs it before."""
        zero = self.engine.optimizer
        for flat in flat_partitions(zero, self.config.zero_stage):
            zero.optimizer.state[flat] = {
                "step": torch.tensor(step, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def scale(self, num_valid: int, micro_batches: int) -> float:
        """Factor that undoes DeepSpeed's averages and turns a sum of token losses into our mean."""
        return micro_batches * self.mesh["dp_cp"].size / num_valid

    def _global_sum(self, value: torch.Tensor) -> float:
        # only last pipeline stages have a loss; the other stages add zeros
        return float(all_reduce(all_reduce(value, self.mesh, "dp_cp"), self.mesh, "pp"))

    def _deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's part of the configuration with what we own filled in."""
        settings = {key: value for key, value in self.config.deepspeed.items() if key != "train_batch_size"}
        settings["gradient_accumulation_steps"] = self.plan.gradient_accumulation_steps
        settings["zero_allow_untested_optimizer"] = True
        settings["zero_force_ds_cpu_optimizer"] = False
        settings.setdefault("steps_per_print", sys.maxsize)  # our run log has a line per step
        return settings

    @abstractmethod
    def _build_module(self) -> nn.Module:
        """This rank's part of the model, on its device."""

    @abstractmethod
    def _mpu(self) -> DeepSpeedMPU | None:
        """What DeepSpeed is told of the layout."""

    @abstractmethod
    def _run_update(self, batches: Sequence[Batch]) -> None:
        """Forward, backward and step; adds to `_loss_sum` and `_aux_sum`."""

    @abstractmethod
    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        """Forward; adds to `_loss_sum`."""


class FlatEngine(Engine):
    """pp = 1: the whole model in every process (but for tp), ZeRO 1, 2 or 3 over dp x cp."""

    def _build_module(self) -> nn.Module:
        phase = self.config.phase
        return NeoBERT(
            self.config.model,
            self.mesh,
            seed=phase.seed,
            recompute=phase.recompute,
            recompute_every=phase.recompute_every,
            row_length=phase.sequence_length,
        ).to(self.mesh.device)

    def _mpu(self) -> DeepSpeedMPU | None:
        return DeepSpeedMPU(self.mesh) if self.mesh["world"].size > 1 else None

    def _run_update(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            loss_sum, aux_loss = self.engine(self._on_device(batch))
            self._loss_sum += loss_sum.detach()
            self._aux_sum += aux_loss.detach()
            self.engine.backward(loss_sum * self.scale(batch.num_valid, len(batches)) + aux_loss)
            self.engine.step()

    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._loss_sum += self.engine(self._on_device(batch))[0]

    def _on_device(self, batch: Batch) -> Batch:
        """This rank's share, with no more document borders than are of use; a pipeline needs fixed shapes."""
        local = local_share(batch.trimmed(), self.mesh, self.config.model).to(self.mesh.device)
        if self.config.phase.compile:
            torch._dynamo.maybe_mark_dynamic(local.cu_seqlens, 0)
        return local


class PipelineParallelEngine(Engine):
    """pp > 1: DeepSpeed's 1F1B pipeline over the same layer list."""

    def _build_module(self) -> nn.Module:
        phase = self.config.phase
        init = Initializer(self.mesh, phase.seed, self.config.model.initializer_range)
        layers = layer_list(
            self.config.model,
            init,
            recompute=phase.recompute,
            recompute_every=phase.recompute_every,
            row_length=phase.sequence_length,
        )
        return build_pipeline(layers, self.mesh, self._loss, balance="Block")

    def _mpu(self) -> DeepSpeedMPU | None:
        return None  # PipelineModule brings its own, from the same rank order

    def _deepspeed_config(self) -> dict[str, Any]:
        return {**super()._deepspeed_config(), "pipeline": dict(PIPELINE_SETTINGS)}

    def _loss(
        self, outputs: tuple[torch.Tensor, torch.Tensor, nn.Parameter], targets: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The last stage's loss of one micro-batch; `targets` are the labels and the scale."""
        hidden, aux_loss, weight = outputs
        labels, scale = targets
        loss_sum = token_losses(hidden, weight, labels, self.mesh).sum()
        self._loss_sum += loss_sum.detach()
        self._aux_sum += aux_loss.detach()
        return loss_sum * scale + aux_loss

    def _feed(self, batches: Sequence[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
        for whole in batches:
            batch = local_share(whole, self.mesh, self.config.model)
            scale = torch.tensor(self.scale(batch.num_valid, len(batches)))
            yield (batch.input_ids, batch.position_ids, batch.cu_seqlens), (batch.labels, scale)

    def _run_update(self, batches: Sequence[Batch]) -> None:
        self.engine.train_batch(data_iter=self._feed(batches))

    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        self.engine.eval_batch(data_iter=self._feed(batches), num_micro_batches=len(batches))


def build_engine(config: Config, plan: BatchPlan, mesh: Mesh) -> Engine:
    """The engine for the layout. torch.distributed must be initialised, also for a world of one."""
    return (PipelineParallelEngine if mesh["pp"].size > 1 else FlatEngine)(config, plan, mesh)


def _start_deepspeed(mesh: Mesh) -> None:
    """Let DeepSpeed adopt our process group, and keep its many start-up lines out of the run log."""
    deepspeed_logger.setLevel(logging.WARNING)
    # torch renamed two collectives that DeepSpeed still calls by their old names, which work
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # PipelineModule broadcasts tied weights once at start; torch warns as if it happened in the forward pass
    warnings.filterwarnings("ignore", message=".*c10d::broadcast_: an autograd kernel was not registered")
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
