"""Learning-rate schedules, the sparse/full schedule, weight-decay groups, and the FLOP count against enumeration."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neomoba_dist.config import PhaseConfig, load_config
from neomoba_dist.model.attention.moba import block_means, select_blocks
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.compiled import is_compiled
from neomoba_dist.train.flops import attention_pairs, last_block_choices, moba_pairs, step_flops
from neomoba_dist.train.optim import learning_rate, moments_of, parameter_groups
from neomoba_dist.train.phases import is_full_attention
from tests.models import tiny_model

PHASE = PhaseConfig(
    name="test", steps=100, sequence_length=8, tokens_per_update=8, learning_rate=1.0, min_learning_rate_ratio=0.1
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, {1: 1.0, 50: 1.0, 100: 1.0}),
        ({"schedule": "constant", "warmup_steps": 10}, {1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0}),
        ({"schedule": "linear"}, {50: 0.55, 100: 0.1}),
        ({"schedule": "linear", "warmup_steps": 50}, {50: 1.0, 75: 0.55, 100: 0.1}),
        ({"schedule": "cosine"}, {25: 0.1 + 0.9 * (2 + 2**0.5) / 4, 50: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "warmup_steps": 10}, {10: 1.0, 90: 1.0, 95: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay_steps": 40}, {60: 1.0, 80: 0.55, 100: 0.1}),
    ],
)
def test_learning_rate(changes: dict[str, object], expected: dict[int, float]) -> None:
    phase = dataclasses.replace(PHASE, **changes)
    assert {step: learning_rate(phase, step) for step in expected} == pytest.approx(expected)


@given(st.floats(0, 1), st.integers(1, 500), st.sampled_from(["tail", "interleave"]))
def test_share_of_full_steps(fraction: float, steps: int, schedule: str) -> None:
    phase = dataclasses.replace(PHASE, steps=steps, full_attention_fraction=fraction, full_attention_schedule=schedule)
    full = [is_full_attention(phase, step) for step in range(1, steps + 1)]
    assert sum(full) == round(fraction * steps)
    if schedule == "tail":
        assert full == sorted(full)
    else:  # every run of steps has its share, to within one step
        for end in range(1, steps + 1):
            assert abs(sum(full[:end]) - sum(full) * end / steps) < 1


def test_weight_decay_spares_norms_and_embeddings() -> None:
    for tied in (False, True):
        model = NeoBERT(tiny_model(tie_word_embeddings=tied), Mesh.single())
        decay, plain = parameter_groups(model.parameters(), 0.1)
        plain_names = {shard_of(p).name for p in plain["params"]}
        assert plain["weight_decay"] == 0.0
        assert decay["weight_decay"] == 0.1
        assert plain_names == {
            n for n in (shard_of(p).name for p in model.parameters()) if "norm" in n or "embedding" in n
        }
        assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_muon_has_the_matrices_inside_blocks_alone() -> None:
    model = NeoBERT(tiny_model(num_experts=4, key_conv_width=3, position_embedding="t5_relative"), Mesh.single())
    linear, decay, plain = parameter_groups(model.parameters(), 0.1, "muon")
    assert linear["orthogonalised"]
    assert not any("orthogonalised" in group for group in (decay, plain))
    assert {shard_of(p).name.split(".")[-1] for p in linear["params"]} == {
        *("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the first of q, k and v, which are one parameter
    }
    assert {shard_of(p).name for p in decay["params"]} >= {"head.weight", "blocks.0.mlp.router.weight"}
    assert any(shard_of(p).name.endswith("key_conv") for p in decay["params"])
    assert [moments_of(group) for group in (linear, decay)] == [("exp_avg",), ("exp_avg", "exp_avg_sq")]
    adamw, *_ = parameter_groups(model.parameters(), 0.1)
    assert {*linear["params"], *decay["params"]} == set(adamw["params"])


def enumerate_pairs(lengths: list[int], block: int, top_k: int) -> float:
    """Pairs of one head under a causal mask with any routing, query by query; a gate score counts half a pair."""
    pairs = 0.0
    for length in lengths:
        for query in range(length):
            own = query // block
            if -(-length // block) <= top_k:
                pairs += query + 1
            else:
                pairs += query % block + 1 + min(own, top_k - 1) * block + own / 2
    return pairs


@pytest.mark.parametrize("lengths", [[64], [7, 100, 33], [8], [1, 200]])
def test_attention_pairs(lengths: list[int]) -> None:
    config = tiny_model(objective="clm", moba_block_size=8, moba_top_k=3)
    counted = attention_pairs(torch.tensor(lengths), config, False)
    assert counted == pytest.approx(enumerate_pairs(lengths, 8, 3), abs=0.5)
    for causal in (False, True):
        config = tiny_model(objective="clm" if causal else "mlm")
        dense = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        assert attention_pairs(torch.tensor(lengths), config, True) == dense


def count_chosen(length: int, size: int, top_k: int, *, causal: bool, pooling: str = "mean") -> float:
    """Pairs per head that the selection itself chooses on random keys, the current block's included."""
    generator = torch.Generator().manual_seed(length + top_k)
    heads, width = 8, 64
    q, k = (torch.randn(length, heads, width, generator=generator) for _ in range(2))
    means = block_means(k, block_size=size, pooling=pooling)
    chosen = select_blocks(q, means, block_size=size, top_k=top_k, causal=causal, pooling=pooling)
    starts = chosen * size
    stops = (starts + size).clamp(max=length)
    if causal:
        stops = torch.minimum(stops, torch.arange(1, length + 1)[:, None, None])
    return float((stops - starts).masked_fill(chosen < 0, 0).sum()) / heads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "size", "top_k"),
    [
        *[(length, 256, 2) for length in (520, 780, 1290, 2060, 4100)],
        *[(length, 128, 3) for length in (385, 511, 900, 2049)],
        (2600, 512, 4),
        (1000, 50, 8),
        (1030, 64, 1),
        (700, 256, 3),
    ],
)
def test_pairs_of_moba_against_the_selection(length: int, size: int, top_k: int, causal: bool) -> None:
    counted = count_chosen(length, size, top_k, causal=causal)
    (expected,) = moba_pairs(torch.tensor([length]), size=size, top_k=top_k, causal=causal).tolist()
    # causal choices do not matter; bidirectional ones are a sample
    assert expected == pytest.approx(counted, rel=1e-12 if causal or top_k == 1 else 0.01)


def test_the_share_of_the_short_block_against_draws() -> None:
    """Many draws, so that the probability itself is seen and not only its small part in the pairs."""
    generator = torch.Generator().manual_seed(0)
    for blocks, tail, size, others in (
        (3, 8, 256, 1),
        (10, 8, 256, 2),
        (10, 250, 256, 2),
        (40, 3, 512, 7),
        (5, 64, 128, 3),
    ):
        whole = torch.randn(200_000, blocks - 2, generator=generator, dtype=torch.float64)
        short = torch.randn(200_000, generator=generator, dtype=torch.float64) * (size / tail) ** 0.5
        drawn = float((short > whole.topk(others).values[:, -1]).double().mean())
        share = last_block_choices(torch.tensor([blocks]), torch.tensor([tail]), size, others)
        assert float(share) == pytest.approx(drawn, abs=4 * (0.25 / 200_000) ** 0.5)


def test_pairs_of_a_layer_add_the_gate() -> None:
    lengths, mlm = torch.tensor([520]), {"objective": "mlm", "moba_block_size": 256, "moba_top_k": 2}
    plain = attention_pairs(lengths, tiny_model(**mlm), False)
    # two whole blocks choose one of two others each, and of the short one half the queries 8 keys in place of 256
    assert plain == 512 * 256 + 8 * 8 + 512 * (256 + 8) // 2 + 8 * 256 + 520 * 3 // 2
    config = tiny_model(**mlm, moba_gate="kv_group", moba_pooling="minmax")
    share = 2 * config.num_key_value_heads / config.num_attention_heads
    assert attention_pairs(lengths, config, False) == plain + round((share - 1) * 520 * 3 / 2)


def test_step_flops_of_the_matrices() -> None:
    """6 operations per parameter and token for every matrix of the blocks (embedding lookups are free)."""
    config = tiny_model()
    model = NeoBERT(config, Mesh.single())
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2)
    lengths = torch.ones(50, dtype=torch.int64)  # one token per document: one pair per token and head
    pairs = 3 * 4 * 50 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert step_flops(config, lengths, 0, True) == 6 * matrices * 50 + pairs
    head = step_flops(config, lengths, 10, True) - step_flops(config, lengths, 0, True)
    assert head == 6 * 10 * config.hidden_size * config.vocab_size


@pytest.mark.parametrize(
    ("device", "settings", "compiled"),
    [
        ("cpu", [], False),
        ("cuda", [], True),
        ("cuda", ["zero_optimization.stage=3"], False),
        ("cuda", ["neomoba.finetune.tasks=sst2"], False),
        ("cuda", ["neomoba.phase.compile=false"], False),
        ("cuda", ["neomoba.phase.compile=cuda_graphs"], True),
        ("cpu", ["neomoba.phase.compile=true"], True),
    ],
)
def test_what_is_compiled_by_default(device: str, settings: list[str], compiled: bool) -> None:
    config = load_config(Path(__file__).parents[3] / "ds_configs/phase3.json", settings)
    assert is_compiled(config, Mesh.single(device)) is compiled
