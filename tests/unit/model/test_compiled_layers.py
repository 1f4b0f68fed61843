"""torch.compile of whole blocks, as `neomoba.phase.compile` does it: no graph break, nothing compiled after step 1,
whatever the number of document borders that `Batch.trimmed` leaves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.models import tiny_batch, tiny_model

LAYERS: dict[str, dict[str, Any]] = {
    "moba": {"key_conv_width": 3},
    "window": {"attention": "sliding_window", "sliding_window": 4, "global_tokens": 2},
    "dropout": {"dropout": 0.2, "norm_placement": "post", "norm": "layernorm"},
    "alibi": {"position_embedding": "alibi"},
    "t5": {"position_embedding": "t5_relative"},
    "t5_window": {"position_embedding": "t5_relative", "attention": "sliding_window", "sliding_window": 4},
}


@pytest.mark.parametrize(("name", "objective"), [(name, "mlm") for name in LAYERS] + [("window", "clm"), ("t5", "clm")])
def test_one_graph_for_all_steps(name: str, objective: str) -> None:
    torch._dynamo.reset()
    config = tiny_model(objective=objective, **LAYERS[name])
    plain, compiled = (NeoBERT(config, Mesh.single(), seed=5) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=counter)  # fullgraph: a break is an error
    counts = []
    for step in range(3):
        batch = tiny_batch(step, objective=objective)
        tail = batch.cu_seqlens[-1:].expand(4**step)
        batch = replace(batch, cu_seqlens=torch.cat((batch.cu_seqlens, tail)))
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)  # as train/engine.py does
        losses = [model(batch)[0] for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*(loss.detach() for loss in losses), atol=1e-5, rtol=1e-6)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3
    assert counts[0] <= 2  # blocks of one kind share their graph
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
