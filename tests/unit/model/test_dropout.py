"""Dropout: masks by whole numbers in plain Python, their share, and that nothing but their names decides them."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.dropout import Dropout, draws_of_tokens
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.equivalence import assemble, pieces
from tests.models import LENGTH, tiny_batch, tiny_model

RATE = 0.3
CONFIG = tiny_model(dropout=RATE)
WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def draws(row_ids: list[int], seed: int = 1, step: int = 2, length: int | None = LENGTH, rows: int = 0) -> Tensor:
    count = (rows or len(row_ids)) * LENGTH
    return draws_of_tokens(torch.tensor(row_ids), count, length, CONFIG, Mesh.single(), (seed, step))


def masks(name: str, draws_S: Tensor, rate: float = RATE, size: int = 32) -> Tensor:
    return Dropout(name, rate)(torch.ones(len(draws_S), size, dtype=torch.float64), draws_S)


def mixed(number: int, key: int) -> int:
    """SplitMix64's number `number` of a key, in plain Python; its sign mixed in instead of its last bit kept."""
    x = (number * GAMMA + key) & WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return (x ^ x >> 31) & (1 << 63) - 1 ^ ((x >> 63) * ((1 << 30) - 1 << 33))


def key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"dropout:{name}".encode()).digest()[:8], "little")


def test_masks_are_those_of_the_formula() -> None:
    row_ids = [7, 3]
    found = masks("blocks.1.mlp", draws(row_ids))
    for row, row_id in enumerate(row_ids):
        row_key = mixed(row_id, key("1:2"))
        for place in range(0, LENGTH, 5):
            layer_key = mixed(mixed(place, row_key), key("blocks.1.mlp"))
            kept = [mixed(feature, layer_key) >= RATE * 2**63 for feature in range(32)]
            expected = torch.tensor(kept, dtype=torch.float64) / (1 - RATE)
            torch.testing.assert_close(found[row * LENGTH + place], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_share_of_what_is_dropped(rate: float) -> None:
    kept = masks("layer", draws(list(range(50))), rate, 128).gt(0).double()
    deviation = (rate * (1 - rate)) ** 0.5
    for dims, size in (((0, 1), 1), ((0,), 128), ((1,), 50 * LENGTH)):
        mean = kept.mean(dims)
        limit = 6 * deviation / (kept.numel() / size) ** 0.5
        assert (mean - (1 - rate)).abs().max() < limit, "overall, of every feature, of every token"
    flat = kept - kept.mean()
    for neighbour in (flat.roll(1, 0), flat.roll(1, 1)):
        assert abs(float((flat * neighbour).mean())) < 6 * deviation**2 / kept.numel() ** 0.5, "no correlation"


def test_every_name_counts() -> None:
    standard = masks("layer", draws([5]))
    others = {
        "row": masks("layer", draws([6])),
        "seed": masks("layer", draws([5], seed=9)),
        "step": masks("layer", draws([5], step=3)),
        "layer": masks("layer2", draws([5])),
        "place": standard.roll(1, 0),
        "feature": standard.roll(1, 1),
    }
    for name, other in others.items():
        apart = float((other != standard).double().mean())
        assert apart == pytest.approx(2 * RATE * (1 - RATE), abs=0.06), name


def test_rows_do_not_know_their_micro_batch() -> None:
    together = draws([5, 8, 11])
    for row, row_id in enumerate([5, 8, 11]):
        assert torch.equal(draws([row_id]), together[row * LENGTH : (row + 1) * LENGTH])
    assert len(together.unique()) == len(together)
    assert torch.equal(draws([5], length=None), draws([5]))


def test_gradient_and_dtypes() -> None:
    draws_S, layer = draws([5]), Dropout("layer", RATE)
    x = torch.randn(LENGTH, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, draws_S).sum(), x)
    assert torch.equal(gradient, masks("layer", draws_S))
    assert layer(x, None) is x
    assert layer(x.bfloat16(), draws_S).dtype == torch.bfloat16


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_models(placement: str) -> None:
    """Off in evaluation; two rows at once are two micro-batches of one; recomputation draws the same again."""
    config = tiny_model(norm_placement=placement, dropout=RATE, position_embedding="learned")
    settings = {"dtype": torch.float64, "seed": 5, "row_length": LENGTH}
    model = NeoBERT(config, Mesh.single(), **settings)
    plain = NeoBERT(replace(config, dropout=0.0), Mesh.single(), **settings)
    batch = tiny_batch(0, rows=2)
    model.step = 4
    found, without = model(batch)[0], plain(batch)[0]
    assert abs(float(found.detach() - without.detach())) > 1e-3 * float(without.detach())
    assert torch.equal(model.eval()(batch)[0], plain(batch)[0])
    model.train()
    halves = [
        replace(
            batch,
            **{name: getattr(batch, name)[row * LENGTH :][:LENGTH] for name in ("input_ids", "labels", "position_ids")},
            cu_seqlens=torch.tensor([0, 49, 59, 64], dtype=torch.int32),
            row_ids=batch.row_ids[row : row + 1],
        )
        for row in range(2)
    ]
    torch.testing.assert_close(sum(model(half)[0] for half in halves), found, rtol=1e-12, atol=0)
    model.step = 5
    assert abs(float(model(batch)[0].detach() - found.detach())) > 1e-3 * float(found.detach())
    model.step = 4
    found.backward()
    gradients = assemble([pieces(model, "grad")])
    for way in ("full", "selective"):
        again = NeoBERT(config, Mesh.single(), recompute=way, **settings)
        again.step = 4
        again(batch)[0].backward()
        for name, gradient in assemble([pieces(again, "grad")]).items():
            assert torch.equal(gradient, gradients[name]), name
    names = [module.key.item() for module in model.modules() if isinstance(module, Dropout)]
    assert len(set(names)) == len(names) == 1 + 2 * config.num_hidden_layers
