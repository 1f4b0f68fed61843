"""What `bench train_step --peer` times beside our engine: the same training by a plain loop, and by transformers.

Both begin with the first weights of ours and take the same batches; the loss of the first update tells whether all
compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.utils import clip_grad_norm_

from evals.cli import EvalError
from neomoba_dist.checkpoint.hf_families import FAMILIES
from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.init import views_of
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.compiled import is_compiled
from neomoba_dist.train.optim import adamw

# what transformers' Qwen3 computes; ours is told to do the same
QWEN3 = ("objective=clm", "qk_norm=true", "attention=full", "position_embedding=rope")


class Peer(Protocol):
    """Another way to train the model of `config`. config, plan: as our engine gets them."""

    def __init__(self, config: Config, plan: BatchPlan, device: torch.device) -> None: ...

    def update(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step; the mean loss over the valid tokens before it."""


class PlainLoop:
    """The model on a mesh of ones, torch's AdamW and clipping: float32, no DeepSpeed, no statistics."""

    def __init__(self, config: Config, plan: BatchPlan, device: torch.device) -> None:
        if config.dtype_name != "float32":
            raise EvalError("--peer plain: a plain loop has no float32 masters of bf16 weights; set bf16.enabled=false")
        phase = config.phase
        self.clipping, self.device = config.gradient_clipping, device
        self.model = NeoBERT(
            config.model,
            Mesh.single(device),
            seed=phase.seed,
            recompute=phase.recompute,
            recompute_every=phase.recompute_every,
            row_length=phase.sequence_length,
        ).to(device)
        self.optimizer = adamw(self.model, phase)

    def update(self, batches: Sequence[Batch]) -> torch.Tensor:
        """See Peer."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss_sum, aux_loss = self.model(batch.trimmed().with_counted().to(self.device))
            (loss_sum / batch.num_valid + aux_loss / len(batches)).backward()
            total += loss_sum.detach()
        clip_grad_norm_(self.model.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / batches[0].num_valid


class Accelerated:
    """transformers' Qwen3 under accelerate. Where ours computes in bf16 it does by autocast; compiled where ours is."""

    def __init__(self, config: Config, plan: BatchPlan, device: torch.device) -> None:
        try:
            from accelerate import Accelerator
            from transformers import Qwen3Config, Qwen3ForCausalLM
        except ImportError as error:
            raise EvalError(
                f"--peer hf needs transformers and accelerate ({error}); install requirements-dev.txt, or what "
                "`make gpu-wheels` collects"
            ) from error

        phase = config.phase
        self.rows, self.clipping, self.device = plan.micro_batch_size, config.gradient_clipping, device
        precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.dtype_name]
        self.accelerator = Accelerator(
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            mixed_precision=precision,
            cpu=device.type == "cpu",
        )
        family = FAMILIES["qwen3"]
        model: Any = Qwen3ForCausalLM(Qwen3Config(**family.from_model(config.model)))
        ours, sources = NeoBERT(config.model, Mesh.single(), seed=phase.seed), family.sources(config.model)
        parts = {shard.name: view.detach() for parameter in ours.parameters() for shard, view in views_of(parameter)}
        model.load_state_dict({source.names[0]: parts[name] for name, source in sources.items()}, strict=False)
        model = model.to(device)
        matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name]
        decayed = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=phase.learning_rate,
            betas=(phase.adam_beta1, phase.adam_beta2),
            eps=phase.adam_eps,
            fused=True,
        )
        if is_compiled(config, Mesh.single(device)):
            model = torch.compile(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def update(self, batches: Sequence[Batch]) -> torch.Tensor:
        """See Peer."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                ids = batch.input_ids.view(self.rows, -1).to(self.device)
                num = torch.tensor(batch.num_valid, device=self.device)
                loss = self.model(input_ids=ids, labels=ids, num_items_in_batch=num, use_cache=False).loss
                self.accelerator.backward(loss * len(batches))  # which divides by their number
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clipping)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach()
        return total


PEERS: dict[str, type[Peer]] = {"plain": PlainLoop, "hf": Accelerated}
