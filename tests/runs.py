"""Train the tiny model on a real corpus inside forked ranks, with the project's own trainer."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config, parse_config
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.assemble import build_stream, build_validation, open_corpora
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from neomoba_dist.train.rehearsal import rehearse
from neomoba_dist.train.trainer import Trainer
from tests.corpora import make_corpus
from tests.models import tiny_model


@functools.cache
def shared_corpus() -> Path:
    """One small corpus for the whole test session; removed with the process's temporary folder."""
    keeper = tempfile.TemporaryDirectory(prefix="neomoba-corpus-")
    shared_corpus.keeper = keeper  # type: ignore[attr-defined] - lives as long as the cache
    return make_corpus(Path(keeper.name)).folder


def run_config(
    layout: dict[str, Any],
    stage: int = 1,
    *,
    deepspeed: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    **phase: Any,
) -> Config:
    """Two MoBA layers and a full one on rows of 128 real tokens, 8 rows per update, half of the steps full."""
    corpus = str(shared_corpus())
    settings = {
        "name": "test",
        "steps": 6,
        "sequence_length": 128,
        "tokens_per_update": 1024,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "full_attention_fraction": 0.5,
        "full_attention_schedule": "interleave",
    }
    return parse_config(
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            **(deepspeed or {}),
            "neomoba": {
                "model": vars(tiny_model(vocab_size=1200, initializer_range=0.02, **(model or {}))),
                "parallel": layout,
                "data": {"train": corpus, "validation": corpus, "max_documents_per_row": 32, "cache": None},
                "phase": {**settings, **phase},
                "checkpoint": {"save_every": 3, **(checkpoint or {})},
                "log": {"tensorboard": False, "validate_every": 3, "validation_rows": 6},
            },
        }
    )


def build_mesh(config: Config) -> Mesh:
    """The mesh that a launch would build."""
    return Mesh.build(config.parallel, num_key_value_heads=config.model.num_key_value_heads)


def train_here(
    config: Config,
    output: Path,
    last_step: int,
    resume: Path | None = None,
    init: Path | None = None,
    *,
    rehearsed: bool = False,
    build: Callable[..., Engine] = build_engine,
) -> None:
    """One rank of a training run; for `run_ranks`."""
    plan = config.plan(dist.get_world_size())
    mesh = build_mesh(config)
    corpora = open_corpora(config)
    engine = build(config, plan, mesh)
    stream = build_stream(config, plan, corpora.train, mesh["dp"].index, mesh)
    validation = build_validation(config, plan, corpora.validation, mesh)
    trainer = Trainer(config, mesh, engine, stream, validation, output)
    if resume:
        trainer.resume(CheckpointReader(resume))
    if init:
        trainer.start_from(CheckpointReader(init))
    if rehearsed:
        rehearse(engine)
    trainer.run(last_step)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The steps of a run without the entries that are times."""
    timed = {"tokens_per_second", "step_seconds", "data_seconds", "tflops_per_rank", "checkpoint_pause_seconds"}
    timed |= {"rank_seconds", "slowest_rank", "slowest_rank_share"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(output / METRICS_FILE)]
