"""Mixtures of experts on a GPU: grouped products against the loop and float64, routers that TF32 does not touch.

Run with `pytest -m gpu tests/gpu`; needs neither DeepSpeed nor megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.moe import ops
from neomoba_dist.model.moe.experts import Experts
from neomoba_dist.model.moe.fp32_linear import exact_linear
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.model.moe.router_ops import rows_in_order
from neomoba_dist.model.moe.swiglu import SwiGLUByExpert, has_grouped_mm, swiglu_by_expert
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.model.optional import is_available
from neomoba_dist.parallel.mesh import Mesh
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

SIZES = {
    "some empty": [5, 0, 10, 1, 4, 0, 20, 0],
    "all to one": [0, 0, 0, 300, 0, 0, 0, 0],
    "first and last empty": [0, 17, 64, 128, 129, 1, 33, 0],
    "even": [64] * 8,
}


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 allowed, as training sets it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_experts(intermediate: int, dtype: torch.dtype, hidden: int = 64) -> Experts:
    config = tiny_model(hidden_size=hidden, num_experts=8, moe_intermediate_size=intermediate)
    return Experts("experts", config, Initializer(Mesh.single(), 3, 0.2, dtype))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().cpu().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("path", ["chosen", "loop"])
@pytest.mark.parametrize("intermediate", [48, 40])
@pytest.mark.parametrize("name", SIZES)
def test_experts_equal_float64(name: str, intermediate: int, path: str) -> None:
    """Output and all gradients in bfloat16; experts without rows get gradients of exactly zero.

    On Hopper the chosen path is that of grouped products.
    """
    sizes = SIZES[name]
    drawn = torch.randn(2, sum(sizes), 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        experts = make_experts(intermediate, torch.bfloat16).to(device, dtype)
        rows, grad = drawn.to(device, dtype)
        inputs = [rows.requires_grad_(), *experts.parameters()]
        hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
        assert has_grouped_mm(rows, experts.gate_proj) == hopper
        out = (swiglu_by_expert if path == "chosen" else SwiGLUByExpert.apply)(*inputs, sizes)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 2e-2
    for weight in results[0][2:]:
        for expert, size in enumerate(sizes):
            assert (weight[expert].abs().max() > 0) == (size > 0)


@pytest.mark.parametrize("intermediate", [36, 12])
def test_widths_that_the_grouped_kernel_refuses(intermediate: int) -> None:
    """1192 over tp 2 leaves 596, no multiple of 8."""
    experts = make_experts(intermediate, torch.bfloat16).to("cuda")
    rows = torch.randn(44, 64, device="cuda", dtype=torch.bfloat16)
    assert not has_grouped_mm(rows, experts.gate_proj)
    out = swiglu_by_expert(rows, *experts.parameters(), [44, 0, 0, 0, 0, 0, 0, 0])
    out.sum().backward()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "choices"), [(257, 64, 48, 2), (1030, 768, 1192, 4)])
def test_a_mixture_equals_float64(
    tokens: int, hidden: int, intermediate: int, choices: int, dropped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients in bfloat16 by grouped products and by the loop; no expert 7, no copy to the host."""
    generator = torch.Generator().manual_seed(0)
    expert_SK = torch.rand(tokens, 7, generator=generator).argsort(1)[:, :choices]
    expert_SK[torch.rand(tokens, choices, generator=generator) < dropped] = -1
    weight = torch.rand(tokens, choices, generator=generator)
    x, grad = torch.randn(2, tokens, hidden, generator=generator).bfloat16()
    results = {}
    names = ["float64", "loop", "chosen"] + ["quack"] * is_available("quack")
    for name in names:
        device, dtype = ("cpu", torch.float64) if name == "float64" else ("cuda", torch.bfloat16)
        experts = make_experts(intermediate, torch.bfloat16, hidden).to(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(device, dtype).requires_grad_(), weight.to(device, exact).requires_grad_()]
        if name == "loop":
            monkeypatch.setattr(ops, "has_grouped_mm", lambda *tensors: False)
        elif name != "float64":
            monkeypatch.undo()
            monkeypatch.setattr(ops, "PREFERRED", "quack" if name == "quack" else "torch")
        hopper = name in ("chosen", "quack") and torch.cuda.get_device_capability()[0] == 9
        chosen, gradient = expert_SK.to(device), grad.to(device, dtype)
        if name == "quack":
            experts(leaves[0], chosen, leaves[1]).backward(gradient)  # builds its kernels
        torch.cuda.set_sync_debug_mode("error" if hopper else "default")
        try:
            y = experts(leaves[0], chosen, leaves[1])
            leaves += experts.parameters()
            results[name] = [y, *torch.autograd.grad(y, leaves, gradient)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in names[2:]:
        for got, loop, want in zip(results[name], results["loop"], results["float64"], strict=True):
            assert relative_error(got, want) < max(1.2 * relative_error(loop, want), 1e-3)
        for got in results[name][3:]:
            assert got[7].abs().max() == 0


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_a_layer_is_captured_and_compiled(mode: str) -> None:
    """Hopper: no size on the host. What is replayed with other tokens equals the plain layer on them."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("elsewhere the experts run one by one")
    settings = {"num_experts": 8, "moe_intermediate_size": 64, "hidden_size": 64, "router_aux_loss_coef": 0.1}
    layer = MoE("m", 0, tiny_model(**settings), Initializer(Mesh.single("cuda"), 3, 0.3, torch.bfloat16)).to("cuda")
    positions = torch.arange(512, device="cuda")
    x, grad = torch.randn(2, 512, 64, device="cuda").bfloat16()
    x.requires_grad_()

    def step(run: Any) -> list[Tensor]:
        y, aux_loss, record = run(x, positions)
        return [y, record, *torch.autograd.grad([y, aux_loss], [x, *layer.parameters()], [grad, aux_loss.new_ones(())])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(layer)  # builds kernels
    torch.cuda.synchronize()
    if mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step(layer)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            positions[-9:] = -1
        if mode == "graph":
            graph.replay()
        else:
            results = step(torch.compile(layer, dynamic=False, fullgraph=True))
        for got, want in zip(results, step(layer), strict=True):
            assert relative_error(got, want.cpu().double()) < 1e-2


@pytest.mark.usefixtures("tf32")
def test_router_products_are_float32() -> None:
    """TF32 would round to 10 bits, an error of about 1e-4 here."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((4096, 512), (64, 512), (4096, 64)))
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        out = exact_linear(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, dtype))])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 2e-6
    assert torch.backends.cuda.matmul.allow_tf32


def test_router_products_of_bfloat16_are_as_exact() -> None:
    """By matrix units: sums in float32, the gradient in three parts. What is left is one rounding at the end."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((4096, 512), (32, 512)))
    grad = torch.randn(4096, 32, generator=generator)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        out = exact_linear(*leaves)
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, out.dtype))])
    assert relative_error(results[0][0], results[1][0]) < 2e-6
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(got, want.bfloat16().double()) < 1e-4  # a value near the middle may round to either side


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_scoring": "sigmoid", "router_bias_update_rate": 0.1, "routed_scaling_factor": 2.5},
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "router_aux_loss_scope": "global"},
        {"num_experts": 40, "num_experts_per_tok": 6},
    ],
    ids=["mixtral", "deepseek", "switch", "many"],
)
def test_the_routers_kernels_equal_float64(changes: dict[str, object]) -> None:
    """Weights, loss, counts and the gradient of the router, in float32."""
    losses = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}
    settings = {"num_experts": 8, "moe_intermediate_size": 16, "hidden_size": 64}
    config: ModelConfig = tiny_model(**{**settings, **losses, **changes})
    drawn = torch.randn(512, 64, generator=torch.Generator().manual_seed(7))
    probe = torch.randn(512, config.num_experts_per_tok, generator=torch.Generator().manual_seed(8))
    positions = torch.arange(256).repeat(2)
    positions[-9:] = -1
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        layer = MoE("m", 0, config, Initializer(Mesh.single(device), 3, 0.5, dtype), row_length=256).to(device)
        layer.router.bias += torch.linspace(-0.3, 0.3, config.num_experts, device=device)
        x = drawn.to(device, dtype).requires_grad_()
        tokens = Tokens.of(positions.to(device), 512, 256, layer.mesh, config)
        assert (rows_in_order(x @ layer.router.weight.t(), tokens, config, layer.mesh) > 0) == (device == "cuda")
        expert, weight, aux_loss, record = layer.router(x, tokens)
        loss = (weight * probe.to(device, dtype)).sum() + aux_loss
        results.append([expert, record, weight, aux_loss, *torch.autograd.grad(loss, (x, layer.router.weight))])
    assert torch.equal(results[0][0].cpu(), results[1][0])
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(got, want.double()) < 1e-5


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_capacity_factor": 0.75}, {"moe_capacity_factor": 1.0, "moe_overflow": "reroute"}],
    ids=["dropless", "drop", "reroute"],
)
def test_layer_chooses_as_on_the_cpu(changes: dict[str, object]) -> None:
    """float32, TF32 allowed: the same counts, and an auxiliary loss as exact as float32."""
    losses = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1, "initializer_range": 0.5}
    settings = {"num_experts": 8, "moe_intermediate_size": 16, "hidden_size": 64, "router_scoring": "sigmoid"}
    config: ModelConfig = tiny_model(**{**settings, **losses, **changes})
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(7))
    positions = torch.arange(256).repeat(2)
    positions[-9:] = -1
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        layer = MoE("m", 0, config, Initializer(Mesh.single(), 3, 0.5, dtype), row_length=256).to(device)
        results.append(layer(x.to(device, dtype), positions.to(device)))
    (y, aux_loss, record), (want, exact_loss, exact_record) = results
    assert torch.equal(record.cpu()[:3], exact_record[:3])
    assert torch.equal(record.cpu()[4:], exact_record[4:])
    assert float(aux_loss.detach()) == pytest.approx(float(exact_loss.detach()), rel=1e-6)
    assert relative_error(y, want) < 5e-3  # the experts themselves may use TF32
