"""Run folders of tiny random models, written in one process with the project's own checkpoint and log code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.checkpoint.save import save_checkpoint
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.config import Config, parse_config
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.init import views_of
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.expert_metrics import routing_entry
from neomoba_dist.train.metrics import RunLog
from tests.models import tiny_model

LENGTH = 96  # twelve blocks of 8 tokens
TOKENS_PER_UPDATE = 4 * LENGTH
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_shared_experts": 1}


@dataclass
class WholeState:
    """What save_checkpoint saves of a model that lies in one process; the moments are zero."""

    config: Config
    model: NeoBERT
    mesh: Mesh

    def local_state(self) -> Iterator[StateFragment]:
        for parameter in self.model.parameters():
            for shard, view in views_of(parameter):
                weights, nothing = view.flatten(), torch.zeros(view.numel())
                yield StateFragment(shard, 0, dict(zip(KINDS, (weights, nothing, nothing), strict=True)))
        for spec, buffer in saved_buffers(self.model):
            yield StateFragment(spec, 0, {"model": buffer.flatten()})


def make_config(corpus: Path, *, name: str = "phase1", objective: str = "mlm", **model: Any) -> Config:
    """Two MoBA layers and a full one on rows of 96 tokens."""
    return parse_config(
        {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "neomoba": {
                "model": vars(tiny_model(vocab_size=1200, objective=objective, **model)),
                "data": {"train": str(corpus), "validation": str(corpus), "max_documents_per_row": 32},
                "phase": {
                    "name": name,
                    "steps": 20,
                    "sequence_length": LENGTH,
                    "tokens_per_update": TOKENS_PER_UPDATE,
                    "learning_rate": 1e-3,
                },
                "log": {"tensorboard": False},
            },
        }
    )


def write_run(folder: Path, config: Config, *, switch_after: int = 20, fingerprint: str | None = None) -> Path:
    """A run folder of 20 steps with one checkpoint of random weights; full attention after step `switch_after`.

    fingerprint: of the training corpus, as the checkpoint names it.
    """
    source = WholeState(
        config,
        MODELS[config.model.objective](config.model, Mesh.single(), seed=7, text_head=config.finetune.head),
        Mesh.single(),
    )
    data = {"data": {"fingerprint": fingerprint}} if fingerprint else {}
    save_checkpoint(folder, 20, source, {"tokens": 20 * TOKENS_PER_UPDATE, "world_size": 4, **data})
    log = RunLog(folder, config, 0, 20)
    for step in range(1, 21):
        entry = {
            "step": step,
            "phase": config.phase.name,
            "loss": 7.0 - 0.1 * step if step != 5 else math.nan,
            "aux_loss": 0.0,
            "grad_norm": 1.0 + 100.0 / step**3,
            "lr": 1e-3 * step / 20,
            "tokens": TOKENS_PER_UPDATE,
            "tokens_per_second": 1000.0 + step,
            "step_seconds": 0.5,
            "full_attention": step > switch_after,
            "skipped": step == 5,
            "skipped_steps": int(step >= 5),
            "layer_grad_norms": [1.0 / step, 2.0 / step, 3.0 / step],
            "activation_rms": [1.0, 2.0, 3.0 + step],
        }
        if config.model.moe_layers:
            rows = [[10.0 + step * expert for expert in range(config.model.num_experts)]] * len(config.model.moe_layers)
            record = torch.tensor([[100.0, 3.0, 2.0, 50.0, *counts] for counts in rows], dtype=torch.float64)
            entry |= routing_entry(record, config.model)
        log.step(entry | ({"validation_loss": 7.1 - 0.1 * step} if step % 10 == 0 else {}))
    log.close()
    return folder


def half_done(whole: Path, output: Path) -> int:
    """Let `output` look like a run that was killed half way, as it wrote; returns how many items are left."""
    lines = (whole / "progress.jsonl").read_text().splitlines()
    half = len(lines) // 2
    output.mkdir(parents=True, exist_ok=True)
    (output / "progress.jsonl").write_text("\n".join(lines[:half]) + "\n" + lines[-1][:7])
    return len(lines) - half


def journal_lines(output: Path) -> int:
    """Lines of a run's journal, the one that was cut off included."""
    return len((output / "progress.jsonl").read_text().splitlines())
