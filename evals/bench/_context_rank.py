"""One rank of `python -m evals bench context`: a forward and backward pass over one long document, and what it took.

Started by torch's launcher; prints a JSON line per rank: peak memory above what the model itself needs, bytes received.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from evals.bench._memory import resident_bytes
from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.comm import barrier
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.launcher import initialize_process_group, map_launcher_environment
from neomoba_dist.parallel.mesh import Mesh

# one MoBA and one full layer, as the project's 128k test has them
MODEL = ModelConfig(
    objective="clm",
    vocab_size=30_000,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=1 << 20,
    hybrid_layer_count=1,
)


def long_batch(tokens: int) -> Batch:
    """One document, 20 % of its tokens counted."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, MODEL.vocab_size, (tokens,), generator=generator)
    labels = torch.where(torch.rand(tokens, generator=generator) < 0.2, input_ids, -100)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        row_ids=torch.zeros(1, dtype=torch.int64),
        num_valid=int((labels >= 0).sum()),
    )


def step(mesh: Mesh, model: NeoBERT, tokens: int) -> None:
    """Forward and backward over this rank's share of `tokens` tokens."""
    batch = local_share(long_batch(tokens), mesh, MODEL)
    (model(batch)[0] / batch.num_valid).backward()


def main(arguments: list[str]) -> None:
    """arguments: tokens, output folder."""
    tokens, folder = int(arguments[0]), Path(arguments[1])
    _, world = map_launcher_environment()
    torch.set_num_threads(1)
    device = initialize_process_group()
    parallel = ParallelConfig(context_parallel_size=world)
    mesh = Mesh.build(parallel, device, num_key_value_heads=MODEL.num_key_value_heads)
    model = NeoBERT(MODEL, mesh)
    step(mesh, model, 2048)  # libraries, gradients and buffers that stay
    barrier(mesh)
    mesh.ledger.entries.clear()
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    step(mesh, model, tokens)
    found = {
        "peak": resident_bytes("VmHWM") - before,
        "process": resident_bytes("VmHWM"),
        "received": sum(mesh.ledger.received().values()),
        "seconds": time.perf_counter() - start,
    }
    (folder / f"{mesh.rank}.json").write_text(json.dumps(found))
    barrier(mesh)


if __name__ == "__main__":
    main(sys.argv[1:])
