"""Position schemes against their published formulas, written out for one number at a time."""

import math

import pytest
import torch

from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.neobert import NeoBERT, layer_list
from neomoba_dist.model.positions import (
    PositionEmbedding,
    ScoreBias,
    alibi_slopes,
    apply_rope,
    rope_cos_sin,
    rope_frequencies,
    rope_temperature,
    sinusoids,
    t5_buckets,
)
from neomoba_dist.parallel.mesh import Mesh
from tests.models import tiny_batch, tiny_model
from tests.reference import t5_bucket

DIM, THETA = 64, 10000.0


def frequencies(**scaling: object) -> torch.Tensor:
    return rope_frequencies(tiny_model(**scaling), DIM)


def plain(pair: int) -> float:
    return THETA ** (-2 * pair / DIM)


def test_rope_frequencies_without_scaling() -> None:
    assert frequencies().tolist() == pytest.approx([plain(i) for i in range(DIM // 2)], rel=1e-14)
    assert rope_temperature(tiny_model()) == 1.0


def test_linear_scaling_is_position_interpolation() -> None:
    scaled = frequencies(rope_scaling_type="linear", rope_scaling_factor=4.0)
    torch.testing.assert_close(scaled * 4, frequencies(), rtol=1e-14, atol=0)


def test_ntk_scaling_keeps_the_fastest_pair_and_interpolates_the_slowest() -> None:
    scaled = frequencies(rope_scaling_type="ntk", rope_scaling_factor=4.0)
    base = THETA * 4.0 ** (DIM / (DIM - 2))
    assert scaled.tolist() == pytest.approx([base ** (-2 * i / DIM) for i in range(DIM // 2)], rel=1e-13)
    assert float(scaled[0]) == 1.0
    assert float(scaled[-1]) == pytest.approx(plain(DIM // 2 - 1) / 4, rel=1e-12)


@pytest.mark.parametrize(("factor", "trained"), [(4.0, 4096), (16.0, 2048), (32.0, 1024)])
def test_yarn(factor: float, trained: int) -> None:
    """NTK by parts as in the authors' code, and its attention temperature."""
    config = tiny_model(rope_scaling_type="yarn", rope_scaling_factor=factor, original_max_position_embeddings=trained)
    scaled = rope_frequencies(config, DIM).tolist()
    low = max(math.floor(DIM * math.log(trained / (32 * 2 * math.pi)) / (2 * math.log(THETA))), 0)
    high = min(math.ceil(DIM * math.log(trained / (1 * 2 * math.pi)) / (2 * math.log(THETA))), DIM - 1)
    for pair, found in enumerate(scaled):
        kept = 1 - min(max((pair - low) / (high - low), 0), 1)
        assert found == pytest.approx(kept * plain(pair) + (1 - kept) * plain(pair) / factor, rel=1e-13)
        turns = trained * plain(pair) / (2 * math.pi)
        if turns > 40:  # well above beta_fast
            assert found == pytest.approx(plain(pair), rel=1e-13)
        if turns < 0.7:  # well below beta_slow
            assert found == pytest.approx(plain(pair) / factor, rel=1e-13)
    assert rope_temperature(config) == pytest.approx(0.1 * math.log(factor) + 1)
    cos, sin = rope_cos_sin(torch.tensor([7]), rope_frequencies(config, DIM), rope_temperature(config))
    assert (cos**2 + sin**2).sqrt().flatten().tolist() == pytest.approx([rope_temperature(config)] * (DIM // 2))


def test_rope_turns_pairs_by_their_angle_and_scores_depend_on_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1, DIM, generator=generator, dtype=torch.float64) for _ in range(2))

    def turn(tensor: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(tensor, *rope_cos_sin(torch.tensor([position]), frequencies()))[0, 0]

    turned, half = turn(x, 5), DIM // 2
    for pair in range(half):
        z = complex(x[0, 0, pair], x[0, 0, pair + half]) * complex(math.cos(5 * plain(pair)), math.sin(5 * plain(pair)))
        assert complex(turned[pair], turned[pair + half]) == pytest.approx(z, rel=1e-12)
    assert float(turn(x, 9) @ turn(y, 2)) == pytest.approx(float(turn(x, 1007) @ turn(y, 1000)), rel=1e-9)


def test_sinusoids() -> None:
    table = sinusoids(torch.tensor([0, 3, 100_000]), 16)
    for row, position in zip(table.tolist(), (0, 3, 100_000), strict=True):
        for i in range(8):
            angle = position / 10000 ** (2 * i / 16)
            assert row[2 * i : 2 * i + 2] == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-10)


def test_alibi_slopes() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    # the authors' code for 12 heads: those of 8, then every second one of 16
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
    )
    assert [len(alibi_slopes(n)) for n in (1, 2, 3, 7, 25)] == [1, 2, 3, 7, 25]


@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets(causal: bool) -> None:
    distances = list(range(0 if causal else -400, 401))
    assert t5_buckets(torch.tensor(distances), causal).tolist() == [t5_bucket(d, causal) for d in distances]
    assert len(set(t5_buckets(torch.arange(-200, 201), causal).tolist())) == (32 if causal else 31)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_added_positions(kind: str) -> None:
    """Added once, at the embedding, by a layer of its own: the tied embedding keeps a single weight."""
    config = tiny_model(position_embedding=kind, tie_word_embeddings=True)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    batch = tiny_batch(0)
    positions = batch.position_ids.index_fill(0, torch.arange(59, 64), -1)  # padding
    state = model.embedding((batch.input_ids, positions, batch.cu_seqlens, PackedTokens(batch.cu_seqlens)))
    assert model.positions is not None
    added = model.positions(state)[0] - state[0]
    if kind == "sinusoidal":
        expected = sinusoids(positions.clamp(min=0), 32)
    else:
        assert shard_of(model.positions.weight).name == "embedding.positions"
        expected = model.positions.weight[positions.clamp(min=0)]
    torch.testing.assert_close(added, expected, atol=1e-14, rtol=0)
    layers = layer_list(config, Initializer(Mesh.single(), 0, 0.02))
    assert [layer.cls for layer in layers].index(PositionEmbedding) == 1
    assert len(list(model.embedding.parameters())) == 1


@pytest.mark.parametrize("kind", ["alibi", "t5_relative"])
def test_bias_follows_its_module_to_a_device_and_keeps_its_precision(kind: str) -> None:
    """Without a copy from the host at every use: constants lie where the module lies."""
    bias = ScoreBias("bias", tiny_model(position_embedding=kind), Initializer(Mesh.single(), 0, 1.0, torch.float32))
    before = bias.constants.clone()
    assert torch.equal(bias.bfloat16().constants, before)
    assert bias.constants.dtype == before.dtype
    assert bias.weight(torch.device("cpu")).dtype in (torch.float64, torch.float32)
    assert bias.to("meta").constants.is_meta
