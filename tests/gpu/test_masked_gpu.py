"""Sliding windows and score biases on a GPU, against float64 on the CPU. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.moba import MobaOptions
from neomoba_dist.model.attention.sliding_window import biased_attention, sliding_window_attention
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.positions import ScoreBias
from neomoba_dist.parallel.mesh import Mesh
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LARGEST = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # float32 sums of a thousand keys, in any order
BORDERS = [0, 0, 700, 701, 1500, 1500]


def make_bias(kind: str, causal: bool) -> ScoreBias:
    config = tiny_model(position_embedding=kind, objective="clm" if causal else "mlm")
    return ScoreBias("bias", config, Initializer(Mesh.single(), 0, 1.0, torch.float64))


def attend(kind: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: ScoreBias) -> Tensor:
    borders = torch.tensor(BORDERS, dtype=torch.int32, device=q.device)
    if kind == "window":
        return sliding_window_attention(q, k, v, window=100, global_tokens=3, causal=causal, cu_seqlens=borders)
    moba = (64, 3) if kind == "moba" else None
    return biased_attention(q, k, v, bias, causal=causal, cu_seqlens=borders, moba=moba and MobaOptions(*moba))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["window", "full", "moba"])
def test_equals_float64(kind: str, dtype: torch.dtype, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1500, heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    bias = make_bias("alibi", causal)
    results = []
    for device, as_dtype in ((DEVICE, dtype), ("cpu", torch.float64)):
        q, k, v, grad = (x.to(device, as_dtype) for x in drawn)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(kind, *leaves, causal, bias)
        results.append([x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, leaves, grad))])
    wrong = [float(((got - want).abs() > LARGEST[dtype]).double().mean()) for got, want in zip(*results, strict=True)]
    # MoBA's gate sees rounded means, so that a choice may fall the other way
    assert max(wrong) <= (1e-2 if kind == "moba" else 0.0), wrong


@pytest.mark.parametrize("kind", ["window", "alibi", "t5_relative"])
def test_one_graph_without_synchronisation(kind: str) -> None:
    bias = None if kind == "window" else make_bias(kind, True).to(DEVICE)
    q, k, v = (torch.randn(1500, heads, 64, device=DEVICE).requires_grad_() for heads in (4, 2, 2))

    def layer(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
        if bias is not None:
            return biased_attention(q, k, v, bias, causal=True, cu_seqlens=borders, moba=MobaOptions(64, 3))
        return sliding_window_attention(q, k, v, window=100, global_tokens=3, causal=True, cu_seqlens=borders)

    compiled = torch.compile(layer, fullgraph=True)
    borders = [torch.tensor([0, split, 1500], dtype=torch.int32, device=DEVICE) for split in (100, 700, 1500)]
    compiled(q, k, v, borders[0]).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for border in borders:
                compiled(q, k, v, border).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
