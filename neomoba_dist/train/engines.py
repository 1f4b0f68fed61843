"""The two engines: FlatEngine (pp = 1, ZeRO 1-3) and PipelineParallelEngine (pp > 1, DeepSpeed's 1F1B, ZeRO-1)."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.data.batch import LEAST_DOCUMENTS, Batch
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.cross_entropy import EAGER, ChunkFunctions
from neomoba_dist.model.dropout import draws_of_tokens
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.neobert import NeoBERT, layer_list, token_losses
from neomoba_dist.parallel.mesh import DeepSpeedMPU, Mesh
from neomoba_dist.parallel.pipeline import PIPELINE_SETTINGS, build_pipeline
from neomoba_dist.train.compiled import compiled_chunks
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.graphs import CapturedBlocks
from neomoba_dist.train.losses import tokens_per_pair


class FlatEngine(Engine):
    """pp = 1: the whole model in every process (but for tp), ZeRO 1, 2 or 3 over dp x cp."""

    captured: CapturedBlocks | None = None  # blocks that run by CUDA graphs

    def __init__(self, config: Config, plan: BatchPlan, mesh: Mesh) -> None:
        if config.phase.cuda_graphs and mesh.device.type != "cuda":
            raise ConfigError("neomoba.phase.compile cuda_graphs: there is no GPU here; set it to auto")
        super().__init__(config, plan, mesh)
        if config.phase.cuda_graphs:
            self.capture_blocks()

    def capture_blocks(self) -> None:
        """From now on blocks run in training by graphs, each recorded when a step of its kind first needs it."""
        assert isinstance(self.module, NeoBERT)
        self.captured = CapturedBlocks(self.module.blocks, self.layer_statistics.sums)
        self.module.run_block = self.captured

    def _build_module(self) -> nn.Module:
        build = MODELS[self.config.model.objective]
        return build(self.config.model, self.mesh, **self._model_settings()).to(self.mesh.device)

    def _model_settings(self) -> dict[str, Any]:
        """Arguments of a model that this engine trains."""
        phase = self.config.phase
        return {
            "seed": phase.seed,
            "recompute": phase.recompute,
            "recompute_every": phase.recompute_every,
            "row_length": self.config.row_length,
            "text_head": self.config.finetune.head,
            "deferred": self.config.zero_stage == 3,
        }

    def _mpu(self) -> DeepSpeedMPU | None:
        return DeepSpeedMPU(self.mesh) if self.mesh["world"].size > 1 else None

    def _run_update(self, batches: Sequence[Batch]) -> None:
        assert isinstance(self.module, NeoBERT)
        self.module.step = self.step
        if self.captured is not None:
            self.captured.make_room(max(batch.document_room() for batch in batches))
        for batch in batches:
            loss_sum, aux_loss = self._losses(self._on_device(batch))
            self._aux_sum += aux_loss.detach()
            self.engine.backward(loss_sum * self.scale(batch.num_valid, len(batches)) + aux_loss)
            self.engine.step()

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, still to be divided by the tokens that count, and auxiliary loss."""
        sums, aux_loss = self.engine(batch)
        return self._add(*self.losses.total(sums, tokens_per_pair(batch))), aux_loss

    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            local = self._on_device(batch)
            self._add(*self.losses.total(self.engine(local)[0], tokens_per_pair(local)))

    def outputs(self, batch: Batch) -> torch.Tensor:
        """What a head on texts says of this rank's documents, [D, K] float32 on the CPU; called by all ranks alike."""
        self.module.eval()
        with torch.no_grad():
            return self.engine(self._on_device(batch), outputs=True).float().cpu()

    def _on_device(self, batch: Batch) -> Batch:
        """This rank's share, with no more document borders than are of use; a pipeline needs fixed shapes."""
        least = self.captured.documents if self.captured is not None and self.module.training else LEAST_DOCUMENTS
        local = self._local(batch.trimmed(least))
        if self.compiled:
            for part in (local, local.encoder):
                if part is not None:
                    torch._dynamo.maybe_mark_dynamic(part.cu_seqlens, 0)
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
        return build_pipeline(
            layers, self.mesh, self._loss, balance="Block", run=self._run_stage, everywhere=self._build_everywhere()
        )

    def _build_everywhere(self) -> nn.Module | None:
        """What every stage has a copy of, if anything."""
        return None

    def _run_stage(
        self, layers: Sequence[Callable[[Any], Any]], inputs: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        """The layers of this stage; what they share every stage makes for itself, as messages are tensors."""
        state: tuple[Any, ...] = (*inputs, self._packed(inputs, dtype))
        for layer in layers:
            state = layer(state)
        return state[:4]

    def _packed(self, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> PackedTokens:
        """What the blocks of a stage share; the last two inputs are the positions and borders."""
        position_ids, cu_seqlens = inputs[-2:]
        model, phase, draws, types, pairs = self.config.model, self.config.phase, None, None, None
        batch = next(self._passing)
        if model.dropout and self.module.training:
            key, count = (phase.seed, self.step), len(position_ids)
            draws = draws_of_tokens(batch.row_ids, count, phase.sequence_length, model, self.mesh, key)
        if model.type_vocab_size:
            local = self._local(batch)
            types, pairs = local.token_type_ids, local.pairs
        packed = PackedTokens.of(position_ids, cu_seqlens, model, self.mesh, dtype, draws)
        return packed._replace(token_types=types, pairs=pairs)

    def _mpu(self) -> DeepSpeedMPU | None:
        return None  # PipelineModule brings its own, from the same rank order

    def _deepspeed_config(self) -> dict[str, Any]:
        return {**super()._deepspeed_config(), "pipeline": dict(PIPELINE_SETTINGS)}

    @cached_property
    def _chunk_functions(self) -> ChunkFunctions:
        return compiled_chunks() if self.compiled else EAGER

    def _loss(self, outputs: tuple[Any, ...], targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The last stage's loss of one micro-batch; `targets` are the labels, the tokens that count, the scale, and
        what other losses need."""
        hidden, aux_loss, output, *made = outputs
        labels, counted, scale, *others = targets
        token_sum = token_losses(hidden, output, labels, self.mesh, counted, self._chunk_functions).sum()
        loss_sum = self._add(*self.losses.joined(token_sum, made, others))
        self._aux_sum += aux_loss.detach()
        return loss_sum * scale + aux_loss

    def _feed(self, batches: Sequence[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
        for whole in batches:
            batch = self._local(whole)
            scale = torch.full((), self.scale(batch.num_valid, len(batches)), device=self.mesh.device)
            assert batch.counted is not None
            targets = (batch.labels, batch.counted, scale, *self.losses.targets(batch))
            yield (batch.input_ids, batch.position_ids, batch.cu_seqlens), targets

    def _run_update(self, batches: Sequence[Batch]) -> None:
        # every stage has all batches and computes them in this order, so nothing more need travel for dropout and pairs
        self._passing = iter(batches)
        self.engine.train_batch(data_iter=self._feed(batches))

    def _run_evaluation(self, batches: Sequence[Batch]) -> None:
        self._passing = iter(batches)
        self.engine.eval_batch(data_iter=self._feed(batches), num_micro_batches=len(batches))


def build_engine(config: Config, plan: BatchPlan, mesh: Mesh) -> Engine:
    """The engine for the layout. torch.distributed must be initialised, also for a world of one."""
    return (PipelineParallelEngine if mesh["pp"].size > 1 else FlatEngine)(config, plan, mesh)
