"""The parts of a block that `neomoba.model` chooses, in float64 against their formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import Initializer, shard_of, views_of
from neomoba_dist.model.mlp import MLPS
from neomoba_dist.model.neobert import Head, NeoBERT
from neomoba_dist.model.norm import NORMS
from neomoba_dist.model.prediction_head import PredictionHead
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import feed_forward_weights, step_flops
from tests.models import tiny_batch, tiny_model

SINGLE = Initializer(Mesh.single(), 0, 0.2, torch.float64)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def norm_formula(kind: str, x: Tensor, norm: torch.nn.Module, eps: float) -> Tensor:
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    return normed + norm.bias if kind == "layernorm" else normed


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


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_norm_after_the_embedding(placement: str, kind: str) -> None:
    """It stands behind added positions, and for the first block's own where that would norm a second time."""
    changes = {"norm": kind, "norm_placement": placement, "position_embedding": "learned"}
    config = tiny_model(embedding_norm=True, **changes)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    batch, eps = tiny_batch(0), config.rms_norm_eps
    assert model.positions is not None
    assert model.embedding_norm is not None
    added = model.embedding.weight[batch.input_ids] + model.positions.weight[batch.position_ids]
    x = norm_formula(kind, added, model.embedding_norm.norm, eps)
    packed = PackedTokens.of(batch.position_ids, batch.cu_seqlens, config, model.mesh, torch.float64)
    first = model.blocks[0]
    assert isinstance(first, Block)
    if placement == "pre":
        assert not list(first.attention_norm.parameters())
        x = x + first.attention(x, packed)
        x = x + first.mlp(norm_formula(kind, x, first.mlp_norm, eps))
    else:
        x = norm_formula(kind, x + first.attention(x, packed), first.attention_norm, eps)
        x = norm_formula(kind, x + first.mlp(x), first.mlp_norm, eps)
    found = next(model.block_states(batch))[0]
    torch.testing.assert_close(found, x, rtol=0, atol=1e-10)
    names = {shard.name for p in model.parameters() for shard, _ in views_of(p)}
    assert "embedding_norm.weight" in names
    assert ("blocks.0.attention_norm.weight" in names) == (placement == "post")
    assert "blocks.1.attention_norm.weight" in names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_prediction_head(kind: str, tied: bool) -> None:
    config = tiny_model(prediction_head=True, norm=kind, tie_word_embeddings=tied)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    head, batch = model.head, tiny_batch(0)
    assert isinstance(head, Head)
    assert isinstance(head.transform, PredictionHead)
    assert head.bias is not None
    assert not head.bias.any(), "biases start at zero"
    with torch.no_grad():
        shard_of(head.bias).valid(head.bias).copy_(draw(151))
    hidden = model.hidden_states(batch).detach().requires_grad_()
    inner = activation_formula("gelu", hidden @ head.transform.dense.T)
    matrix = shard_of(head.weight).valid(head.weight)
    assert (head.weight is model.embedding.weight) == tied
    logits = norm_formula(kind, inner, head.transform.norm, config.rms_norm_eps) @ matrix.T + head.bias[:151]
    torch.testing.assert_close(model.logits(hidden), logits, rtol=0, atol=1e-10)
    counted = batch.labels != -100
    wanted = -logits.log_softmax(-1)[counted, batch.labels[counted]]
    losses = head((hidden, *[torch.zeros(())] * 4), batch.labels)
    torch.testing.assert_close(losses[counted], wanted, rtol=0, atol=1e-10)
    leaves = [hidden, *head.parameters()]
    one, other = (torch.autograd.grad(x.square().sum(), leaves) for x in (losses, wanted))
    for gradient, expected in zip(one, other, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)
    lengths, plain = torch.tensor([49, 10, 5]), replace(config, prediction_head=False)
    more = step_flops(config, lengths, 9, True) - step_flops(plain, lengths, 9, True)
    assert more == 3 * 2 * 64 * head.transform.dense.numel(), "of every token"


def test_windows_with_a_rotation_of_their_own() -> None:
    """Queries and keys of sliding-window layers turn by their own base, unscaled, those of the others as before."""
    changes = {"attention": "moba,sliding_window,full", "rope_scaling_type": "linear", "rope_scaling_factor": 4.0}
    config = tiny_model(sliding_rope_theta=50.0, **changes)
    assert Block(1, config, SINGLE, attention="sliding_window").attention.head_dim == 8
    batch, x = tiny_batch(0), draw(64, 32)
    packed = PackedTokens.of(batch.position_ids, batch.cu_seqlens, config, Mesh.single(), torch.float64)
    for index, (kind, theta, factor) in enumerate(
        [("moba", 1e4, 4.0), ("sliding_window", 50.0, 1.0), ("full", 1e4, 4.0)]
    ):
        attention = Block(index, config, SINGLE, attention=kind).attention
        q, k, _ = attention.project(x, packed)
        standing = PackedTokens.of(torch.zeros(64, dtype=torch.int64), batch.cu_seqlens, config, Mesh.single(), x.dtype)
        angle = batch.position_ids[:, None] / factor * theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        for turned, still in zip((q, k), attention.project(x, standing)[:2], strict=True):
            wanted = torch.complex(*still.chunk(2, dim=-1)) * turn
            torch.testing.assert_close(turned, torch.cat((wanted.real, wanted.imag), dim=-1), rtol=0, atol=1e-12)
        attention.full = True  # the rotation is what a layer was trained with, whatever it attends to
        assert torch.equal(attention.project(x, packed)[0], q)


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
