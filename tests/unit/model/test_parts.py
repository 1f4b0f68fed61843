"""The parts of a block that `neomoba.model` chooses, in float64 against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import Initializer, views_of
from neomoba_dist.model.mlp import MLPS
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.model.norm import NORMS
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import feed_forward_weights
from tests.models import tiny_batch, tiny_model

SINGLE = Initializer(Mesh.single(), 0, 0.2, torch.float64)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def norm_formula(kind: str, x: Tensor, norm: torch.nn.Module, eps: float) -> Tensor:
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind: str) -> None:
    norm = NORMS[kind]("norm", 24, 1e-2, SINGLE, partial=False)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(draw(24))
    x = (0.1 * draw(7, 24) + 0.3).requires_grad_()
    torch.testing.assert_close(norm(x), norm_formula(kind, x, norm, 1e-2), rtol=0, atol=1e-12)
    leaves, upstream = [x, *norm.parameters()], draw(7, 24)
    found = torch.autograd.grad(norm(x), leaves, upstream)
    wanted = torch.autograd.grad(norm_formula(kind, x, norm, 1e-2), leaves, upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_where_norms_stand(placement: str, kind: str) -> None:
    config = tiny_model(norm=kind, norm_placement=placement)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    batch, eps = tiny_batch(0), config.rms_norm_eps
    packed = PackedTokens.of(batch.position_ids, batch.cu_seqlens, config, model.mesh, torch.float64)
    x = model.embedding.weight[batch.input_ids]
    for block in model.blocks:
        assert isinstance(block, Block)
        first, second = block.attention_norm, block.mlp_norm
        if placement == "pre":
            x = x + block.attention(norm_formula(kind, x, first, eps), packed)
            x = x + block.mlp(norm_formula(kind, x, second, eps))
        else:
            x = norm_formula(kind, x + block.attention(x, packed), first, eps)
            x = norm_formula(kind, x + block.mlp(x), second, eps)
    if placement == "pre":
        x = norm_formula(kind, x, model.final_norm.norm, eps)
    else:
        assert not list(model.final_norm.parameters())
    torch.testing.assert_close(model.hidden_states(batch), x, rtol=0, atol=1e-10)


def activation_formula(kind: str, x: Tensor) -> Tensor:
    if kind == "relu":
        return torch.where(x > 0, x, 0)
    if kind.startswith("ge"):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("kind", MLPS)
def test_feed_forward_layers(kind: str) -> None:
    config = tiny_model(mlp_activation=kind)
    mlp = MLPS[kind]("blocks.0.mlp", config, SINGLE)
    weights = {shard.name.split(".")[-1]: view for p in mlp.parameters() for shard, view in views_of(p, p)}
    gated = kind in ("swiglu", "geglu")
    assert weights.keys() == {"up_proj", "down_proj"} | ({"gate_proj"} if gated else set())
    assert feed_forward_weights(config) == 3 * sum(weight.numel() for weight in weights.values()), "of three layers"
    x = draw(7, 32).requires_grad_()
    inner = activation_formula(kind, x @ weights["gate_proj" if gated else "up_proj"].T)
    wanted = (inner * (x @ weights["up_proj"].T) if gated else inner) @ weights["down_proj"].T
    found = mlp(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    leaves, upstream = [x, *mlp.parameters()], draw(7, 32)
    one, other = (torch.autograd.grad(result, leaves, upstream) for result in (found, wanted))
    for gradient, expected in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)
