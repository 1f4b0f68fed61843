"""Mixtures of experts on a GPU: grouped products against the loop and float64, routers that TF32 does not touch.

Run with `pytest -m gpu tests/gpu`; needs neither DeepSpeed nor megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.moe.experts import Experts, SwiGLUByExpert, has_grouped_mm
from neomoba_dist.model.moe.fp32_linear import exact_linear
from neomoba_dist.model.moe.layer import MoE
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
        out = experts(rows, sizes) if path == "chosen" else SwiGLUByExpert.apply(*inputs, sizes)
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
    out = experts(rows, [44, 0, 0, 0, 0, 0, 0, 0])
    out.sum().backward()
    assert torch.isfinite(out).all()


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
