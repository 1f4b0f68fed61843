"""Linear layers on a CPU: oneDNN's products are those of torch in both directions, and taken where they are faster."""

import pytest
import torch
import torch.nn.functional as F

from neomoba_dist.parallel import gemm

SIZES = [(96, 128, 96), (gemm.FEW_ROWS, 512, 64), (gemm.FEW_ROWS - 1, 512, 64), (40, 16, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features", "outputs"), SIZES)
def test_it_is_torchs_linear(tokens: int, features: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, features), (outputs, features), (tokens, outputs))
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    exact = [x @ weight.t(), grad @ weight, grad.t() @ x]
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight)]
    out = gemm.linear(*inputs)
    found = [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]
    eps = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < eps * other.abs().max()


def test_which_products_are_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(gemm, "product", lambda x, w: taken.append(tuple(x.shape)) or x @ w.t())
    x, weight = torch.randn(64, 128), torch.randn(96, 128)
    for case in (x, x.double(), x[: gemm.FEW_ROWS - 1], x[None]):
        assert torch.equal(gemm.linear(case, weight.to(case.dtype)), F.linear(case, weight.to(case.dtype)))
    assert taken == [(64, 128)]


def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight = torch.randn(64, 128), torch.randn(96, 128, requires_grad=True)
    gemm.linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
