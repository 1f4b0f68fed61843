"""Learning-rate schedules, the sparse/full schedule, weight-decay groups, and the FLOP count against enumeration."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neomoba_dist.config import PhaseConfig
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import attention_pairs, step_flops
from neomoba_dist.train.optim import learning_rate, parameter_groups
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
        decay, plain = parameter_groups(model, 0.1)
        plain_names = {p.shard.name for p in plain["params"]}
        assert plain["weight_decay"] == 0.0
        assert decay["weight_decay"] == 0.1
        assert plain_names == {n for n in (p.shard.name for p in model.parameters()) if "norm" in n or "embedding" in n}
        assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))


def enumerate_pairs(lengths: list[int], block: int, top_k: int, causal: bool) -> float:
    """Pairs of one head with any routing, query by query; a gate score of another block counts half a pair."""
    pairs = 0.0
    for length in lengths:
        total = -(-length // block)
        for query in range(length):
            own = query // block
            if total <= top_k:
                pairs += query + 1 if causal else length
            elif causal:
                pairs += query % block + 1 + min(own, top_k - 1) * block + own / 2
            else:
                own_size = min(block, length - own * block)
                pairs += min(own_size + (top_k - 1) * block, length) + total / 2
    return pairs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[64], [7, 100, 33], [8], [1, 200]])
def test_attention_pairs(lengths: list[int], causal: bool) -> None:
    config = tiny_model(objective="clm" if causal else "mlm", moba_block_size=8, moba_top_k=3)
    counted = attention_pairs(torch.tensor(lengths), config, False)
    # bidirectional: the chosen blocks may include the partial last one, which the count takes as whole
    assert counted == pytest.approx(enumerate_pairs(lengths, 8, 3, causal), rel=0.02, abs=2)
    dense = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    assert attention_pairs(torch.tensor(lengths), config, True) == dense


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
