"""The mixture of experts on one rank against loops over tokens: output, losses, counts, every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.mlp import SwiGLU
from neomoba_dist.model.moe.fp32_linear import exact_linear
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.model.moe.router import update_bias
from neomoba_dist.model.moe.swiglu import SwiGLUByExpert, grouped_swiglu
from neomoba_dist.model.moe.tokens import Tokens
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.layer_stats import LayerStatistics
from tests.models import tiny_batch, tiny_model
from tests.reference_moe import mixture

ROW, TOKENS, HIDDEN = 24, 48, 16
DEEPSEEK = {
    "router_scoring": "sigmoid",
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "router_bias_update_rate": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "switch": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "qwen3 without renormalising": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "deepseek v3": {**DEEPSEEK, "num_shared_experts": 1},
    "groups with softmax": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "drop": {"moe_capacity_factor": 0.75},
    "pad": {"moe_capacity_factor": 1.0, "moe_overflow": "pad"},
    "reroute": {"moe_capacity_factor": 1.0, "moe_overflow": "reroute"},
    "reroute until full": {"moe_capacity_factor": 0.5, "moe_overflow": "reroute"},
    "reroute within groups": {**DEEPSEEK, "moe_capacity_factor": 1.0, "moe_overflow": "reroute"},
    "one row of padding": {"padding": True},
}


def make_layer(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[MoE, ModelConfig]:
    settings = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "hidden_size": HIDDEN}
    losses = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1, "initializer_range": 0.5}
    config = tiny_model(**{**settings, **losses, **changes})
    layer = MoE("m", 0, config, Initializer(Mesh.single(), 3, config.initializer_range, dtype), row_length=ROW)
    return layer, config


def make_inputs(padding: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    positions = torch.arange(ROW).repeat(2)
    positions[ROW - 5 : ROW] = -1
    if padding:
        positions[ROW:] = -1
    return x_TH.requires_grad_(), positions


@pytest.mark.parametrize("name", CASES)
def test_against_loops(name: str) -> None:
    changes = dict(CASES[name])
    x_TH, positions = make_inputs(changes.pop("padding", False))
    layer, config = make_layer(**changes)
    layer.router.bias += torch.linspace(-0.3, 0.3, 8) * (config.router_bias_update_rate > 0)
    probe = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {**dict(layer.named_parameters()), "router.bias": layer.router.bias}
    inputs = [x_TH, *layer.parameters()]

    y_TH, aux_loss, record = layer(x_TH, positions)
    gradients = torch.autograd.grad((y_TH * probe).sum() + aux_loss, inputs)
    expected = mixture(x_TH, (positions >= 0).tolist(), weights, config, ROW)
    wanted = torch.autograd.grad((expected.output * probe).sum() + expected.aux_loss, inputs)

    torch.testing.assert_close(y_TH, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aux_loss, expected.aux_loss, rtol=1e-12, atol=0)
    for gradient, value in zip(gradients, wanted, strict=True):
        assert value.abs().max() > 0
        torch.testing.assert_close(gradient, value, rtol=1e-11, atol=1e-12)
    tokens, dropped, rerouted, entropy, *asked = record.tolist()
    assert tokens == int((positions >= 0).sum())
    assert asked == expected.asked
    assert (dropped, rerouted) == (expected.dropped, expected.rerouted)
    assert 0 < entropy / tokens < 2.08
    if "drop" in name or name == "pad" or "full" in name:
        assert dropped > 0
    if "reroute" in name:
        assert rerouted > 0
    if "groups" in name or name == "deepseek v3":
        freely, _ = make_layer(**{**changes, "n_group": 1, "topk_group": 1})
        assert not torch.allclose(freely(x_TH, positions)[0], y_TH), "the groups must matter"


def test_evaluation_has_no_capacity_and_no_losses() -> None:
    x_TH, positions = make_inputs()
    layer, _ = make_layer(moe_capacity_factor=0.5)
    free, _ = make_layer()
    y_TH, aux_loss, record = layer.eval()(x_TH, positions)
    assert torch.equal(y_TH, free(x_TH, positions)[0])
    assert aux_loss == 0
    assert record[1] == 0


@pytest.mark.parametrize("changes", [{}, {"moe_capacity_factor": 1.0, "moe_overflow": "pad"}], ids=["dropless", "pad"])
def test_all_tokens_to_one_expert_and_none_to_another(changes: dict[str, Any]) -> None:
    x_TH, positions = make_inputs()
    layer, _ = make_layer(router_bias_update_rate=1.0, **changes)
    layer.router.bias += torch.tensor([0.0, 0, 9, 0, 0, -9, 0, 0])
    y_TH, aux_loss, record = layer(x_TH, positions)
    (y_TH.square().sum() + aux_loss).backward()
    counts = record[4:].tolist()
    assert counts[5] == 0
    assert counts[2] == 43
    # of the second choices, too, some find no room
    assert (record[1] >= 43 - 2 * 6) if changes else (record[1] == 0)
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert weight.grad[5].abs().max() == 0
        assert weight.grad[2].abs().max() > 0
    nothing = torch.full_like(positions, -1)
    y_TH, aux_loss, record = layer(x_TH, nothing)
    assert y_TH.abs().max() == 0
    assert aux_loss == 0
    assert record.sum() == 0


def test_the_choice_of_causal_tokens_depends_on_no_later_one() -> None:
    for overflow in ("drop", "reroute"):
        layer, _ = make_layer(moe_capacity_factor=0.75, moe_overflow=overflow)
        x_TH, positions = make_inputs()
        before = layer(x_TH, positions)[0][: ROW // 2]
        changed = torch.cat((x_TH[: ROW // 2], x_TH[ROW // 2 :].flip(0)))
        torch.testing.assert_close(layer(changed, positions)[0][: ROW // 2], before, rtol=1e-12, atol=1e-12)


def test_float32_routes_as_float64_and_bfloat16_decides_in_float32() -> None:
    x_TH, positions = make_inputs()
    exact, _ = make_layer()
    single, _ = make_layer(torch.float32)
    torch.testing.assert_close(
        single(x_TH.float(), positions)[0].double(), exact(x_TH, positions)[0], rtol=0, atol=1e-5
    )
    half, config = make_layer(torch.bfloat16)
    tokens = Tokens.of(positions, TOKENS, ROW, Mesh.single(), config)
    _, weight_SK, aux_loss, _ = half.router(x_TH.bfloat16(), tokens)
    assert weight_SK.dtype == aux_loss.dtype == torch.float32
    assert half(x_TH.bfloat16(), positions)[0].dtype == torch.bfloat16


def test_the_global_balance_is_that_of_all_tokens() -> None:
    x_TH, positions = make_inputs()
    layer, config = make_layer(router_aux_loss_scope="global")
    weights = {**dict(layer.named_parameters()), "router.bias": layer.router.bias}
    expected = mixture(x_TH, (positions >= 0).tolist(), weights, config, TOKENS).aux_loss
    torch.testing.assert_close(layer(x_TH, positions)[1], expected, rtol=1e-12, atol=0)
    assert make_layer()[0](x_TH, positions)[1] != expected


def test_jitter_is_noise_of_its_key() -> None:
    tokens = Tokens.of(torch.arange(2000), 2000, 1000, Mesh.single(), tiny_model())
    noise = tokens.noise(64, 0.1, (5, 1, 2))
    assert torch.equal(noise[:1000], noise[1000:])  # rows alike
    assert torch.equal(noise, tokens.noise(64, 0.1, (5, 1, 2)))
    assert 0.9 <= noise.min() < 0.9001
    assert 1.0999 < noise.max() <= 1.1
    assert abs(noise[:1000].mean() - 1) < 1e-3
    assert abs(noise[:1000].std() - 0.1 / 3**0.5) < 1e-3
    for other in ((6, 1, 2), (5, 2, 2), (5, 1, 3)):
        assert abs(torch.corrcoef(torch.stack((noise.flatten(), tokens.noise(64, 0.1, other).flatten())))[0, 1]) < 0.02
    assert abs(torch.corrcoef(noise[:1000].T).fill_diagonal_(0)).max() < 0.2

    x_TH, positions = make_inputs()
    layer, _ = make_layer(router_jitter=0.3)
    first = layer(x_TH, positions)[0]
    assert torch.equal(layer(x_TH, positions)[0], first)
    layer.router.set_step(1)
    assert not torch.equal(layer(x_TH, positions)[0], first)
    layer.eval()
    assert torch.equal(layer(x_TH, positions)[0], make_layer()[0].eval()(x_TH, positions)[0])


def test_update_bias() -> None:
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10.0, 20, 30, 20], dtype=torch.float64), 0.01)
    torch.testing.assert_close(bias, torch.tensor([0.01, 0, -0.01, 0]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_capacity_factor": 1.0},
        {"moe_capacity_factor": 1.0, "moe_overflow": "pad"},
        {"moe_capacity_factor": 1.0, "moe_overflow": "reroute"},
    ],
    ids=["dropless", "drop", "pad", "reroute"],
)
def test_biases_balance_what_the_router_asks_for(changes: dict[str, Any]) -> None:
    """A capacity would hide the imbalance from them: every expert is full, though all tokens ask for two."""
    layer, _ = make_layer(router_scoring="sigmoid", router_bias_update_rate=0.02, **changes)
    layer.router.bias += torch.tensor([0.7, 0.6, 0, 0, 0, 0, 0, -0.2])
    x_TH = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(ROW).repeat(2)
    violations = []
    for _ in range(60):
        with torch.no_grad():
            asked = layer(x_TH, positions)[2][4:]
        assert asked.sum() == 2 * TOKENS
        violations.append(float(asked.max() / asked.mean() - 1))
        update_bias(layer.router.bias, asked, 0.02)
    assert violations[0] > 2
    assert max(violations[-10:]) < 0.6


def test_router_products_stay_exact_where_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's switch is off during each, on again after; gradients are those of a linear layer."""
    during = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        during.append(torch.backends.cuda.matmul.allow_tf32)
        return torch.matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 5), (4, 5), (9, 4)))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        out = exact_linear(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert during == [False] * 3
    torch.testing.assert_close(out, F.linear(x, weight))
    for got, want in zip(gradients, torch.autograd.grad(F.linear(x, weight), leaves, grad), strict=True):
        torch.testing.assert_close(got, want)


def test_grouped_products_are_those_of_single_experts() -> None:
    """The path of GPUs; torch's CPU kernel is a stand-in for theirs."""
    layer, _ = make_layer(torch.float32)
    rows = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sizes = [5, 0, 10, 1, 4, 0, 20, 0]
    inputs = [rows, *layer.experts.parameters()]
    results = [SwiGLUByExpert.apply(*inputs, sizes), grouped_swiglu(rows, *layer.experts.parameters(), sizes)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in results]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek v3", "drop", "pad", "jitter"])
def test_compiles_into_one_graph_for_all_steps(name: str) -> None:
    """And computes what the plain layer does."""
    torch._dynamo.reset()
    changes = {"router_jitter": 0.1} if name == "jitter" else CASES[name]
    layers = [make_layer(**changes)[0] for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    layers[1].compile(dynamic=False, fullgraph=True, backend=counter)  # fullgraph: a break is an error
    x_TH, positions = make_inputs()
    for step in range(3):
        results = []
        for layer in layers:
            layer.router.set_step(step)
            y_TH, aux_loss, record = layer(x_TH * (step + 1), positions.roll(step))
            loss = y_TH.square().sum() + aux_loss
            results.append([y_TH, aux_loss, record, *torch.autograd.grad(loss, [x_TH, *layer.parameters()])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_where_the_experts_are() -> None:
    sparse = {"num_experts": 4, "moe_intermediate_size": 8, "num_hidden_layers": 6}
    every = tiny_model(**sparse)
    assert every.moe_layers == (0, 1, 2, 3, 4, 5)
    some = tiny_model(**sparse, first_k_dense_replace=1, moe_layer_frequency=2)
    assert some.moe_layers == (2, 4)
    assert tiny_model().moe_layers == ()
    init = Initializer(Mesh.single(), 0, 0.02)
    assert [type(Block(i, some, init).mlp) for i in range(6)] == [SwiGLU, SwiGLU, MoE, SwiGLU, MoE, SwiGLU]
    assert tiny_model(num_experts=4).moe_intermediate_size == 48


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_in_the_whole_model(objective: str, recompute: str) -> None:
    """With MoBA in the same block; recomputation changes nothing and counts nothing twice."""
    config = tiny_model(objective=objective, num_experts=4, moe_intermediate_size=24, router_jitter=0.1)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5, recompute=recompute)
    statistics = LayerStatistics(model, config, model.mesh)
    batch = tiny_batch(0, objective=objective)
    loss, aux_loss = model(batch)
    (loss + aux_loss).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert statistics.sums[:, 2].tolist() == [64.0] * 3
    plain = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    other = plain(batch)
    assert other[0] == loss
    torch.stack(other).sum().backward()
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad)
    dense = NeoBERT(replace(config, num_experts=0), Mesh.single(), dtype=torch.float64, seed=5)
    assert abs(dense(batch)[0] - loss) > 1e-3
