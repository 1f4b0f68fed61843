"""A whole update of the engine on a GPU waits for it where the numbers of all ranks come together, and nowhere else.

The engine runs in a process of its own, `python -m tests.gpu.test_update_gpu PHASE.KEY=VALUE...`, because tests have
DeepSpeed on the CPU. Needs all of requirements.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "compiled": (),
    "eager": ("neomoba.phase.compile=false",),
    "recomputed": ("neomoba.phase.recompute=full",),
    "full": ("neomoba.phase.full_attention_fraction=1",),
    "graphs": ("neomoba.phase.compile=cuda_graphs",),
    "graphs, recomputed": ("neomoba.phase.compile=cuda_graphs", "neomoba.phase.recompute=full"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_the_host_waits_once_in_an_update(name: str) -> None:
    assert "four updates, one of them without waiting: loss" in updates(SETTINGS[name])


@pytest.mark.gpu
def test_graphs_give_the_same_updates() -> None:
    """Bit for bit: the same kernels in the same order, on the same numbers."""
    exact = "neomoba.phase.deterministic=true"
    plain, graphs = (updates((f"neomoba.phase.compile={how}", exact)) for how in ("true", "cuda_graphs"))
    assert plain == graphs


def updates(changes: Sequence[str]) -> str:
    """What the last line of `main` says, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    words = [sys.executable, "-m", "tests.gpu.test_update_gpu", *changes]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AccumulateGrad" not in done.stderr  # torch's warning of gradients that are taken on another stream
    return done.stdout.splitlines()[-1]


def main(changes: list[str]) -> None:
    """Four updates of a small model in bf16 with the keys of phase 3, from the second on of more documents than the
    first one's; the last one may not wait."""
    from evals.bench.train_step import random_batches
    from neomoba_dist.config import load_config
    from neomoba_dist.parallel.launcher import initialize_process_group, map_launcher_environment
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train import engine as module
    from neomoba_dist.train.engines import build_engine

    small = ["num_hidden_layers=3", "hidden_size=256", "num_attention_heads=4", "intermediate_size=512"]
    small += ["hybrid_layer_count=1", "moba_block_size=128", "max_position_embeddings=2048"]
    settings = [f"neomoba.model.{change}" for change in small]
    settings += ["neomoba.phase.sequence_length=2048", "neomoba.phase.tokens_per_update=4096"]
    config = load_config(ROOT / "ds_configs/phase3.json", [*settings, *changes])
    map_launcher_environment()
    mesh = Mesh.build(config.parallel, initialize_process_group())
    plan = config.plan(1)
    engine = build_engine(config, plan, mesh)
    engine.set_full_attention(config.phase.full_attention_fraction == 1)
    batches = random_batches(config, plan)
    assert len(batches) == 2
    allow = torch.cuda.set_sync_debug_mode if mesh.device.type == "cuda" else str
    sum_together = module.sum_together

    def waits(*args: Any) -> Any:
        allow("default")
        result = sum_together(*args)
        allow("error")
        return result

    engine.update(batches, 1e-3)  # compiles, makes AdamW's moments
    borders = torch.arange(0, 2048 + 1, 64, dtype=torch.int32)
    batches = [replace(batch, cu_seqlens=borders, position_ids=torch.arange(2048) % 64) for batch in batches]
    for _ in range(2):  # records graphs anew
        engine.update(batches, 1e-3)
    module.sum_together = waits
    allow("error")
    result = engine.update(batches, 1e-3)
    allow("default")
    print(f"four updates, one of them without waiting: loss {result.loss}, norm {result.grad_norm}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
