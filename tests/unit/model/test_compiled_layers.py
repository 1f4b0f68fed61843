"""torch.compile of whole blocks, as `neomoba.phase.compile` does it: no graph break, nothing compiled after step 1,
whatever the number of document borders that `Batch.trimmed` leaves. What stands between products is fused on a GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.gpu_code import GPUCode, Graph
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
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)  # as train/engines.py does
        losses = [model(batch)[0] for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*(loss.detach() for loss in losses), atol=1e-5, rtol=1e-6)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3
    assert counts[0] <= 2  # blocks of one kind share their graph
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


# what the names of the kernels of a block say, in the order of their launch; a kernel may say more
FORWARD = [
    ("mul", "rsqrt"),  # the first norm
    ("cat", "mul"),  # rotation of queries, with its casts
    ("cat", "mul"),  # of keys
    ("add", "rsqrt"),  # the residual and the second norm
    ("mul", "silu"),  # SwiGLU; the last residual is added by the product before it
]
BACKWARD = [
    ("mul", "silu", "silu_backward", "cat"),  # SwiGLU, both halves
    ("add", "mul", "sum"),  # the second norm, with the residual's gradient
    ("cat", "mul"),  # the rotation of one of queries and keys
    ("cat", "mul"),  # of the other
    ("cat",),  # gradients of q, k and v side by side
    ("mul", "sum"),  # the norms' weights, each in two stages
    ("mul", "sum"),
    ("mul", "sum"),
    ("add", "mul", "sum"),  # the first norm, with the residual's gradient
]


def gpu_graphs() -> list[Graph]:
    """Forward and backward of a MoBA and of a full block, as a GPU would run them in bfloat16."""
    torch._dynamo.reset()
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
    model = NeoBERT(tiny_model(**sizes, qk_norm=False), Mesh.single(), seed=5, dtype=torch.bfloat16)
    gpu = GPUCode()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=gpu)
    model(tiny_batch(0, rows=16))[0].backward()
    return gpu.graphs


def test_what_stands_between_products_is_fused() -> None:
    graphs = gpu_graphs()
    assert sorted(graph.is_backward for graph in graphs) == [False, False, True, True]
    for graph in graphs:
        expected = BACKWARD if graph.is_backward else FORWARD
        assert graph.products == (8 if graph.is_backward else 4)
        assert len(graph.kernels) == len(expected), graph.kernels
        for kernel, words in zip(graph.kernels, expected, strict=True):
            assert all(f"_{word}_" in kernel for word in words), (kernel, words)


def test_the_count_of_kernels_sees_what_is_not_fused() -> None:
    fused = gpu_graphs()
    with torch._inductor.config.patch(max_fusion_size=1):
        apart = gpu_graphs()
    for graph, other in zip(fused, apart, strict=True):
        assert len(graph.kernels) < len(other.kernels)
        assert graph.moved < other.moved
