"""Masks and labels: rates, what may never be chosen, dependence on (seed, row) only."""

from __future__ import annotations

import numpy as np
import pytest

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.masking import MaskedLanguageModel, next_token_labels

VOCAB, SPECIAL, MASK = 120, 20, 4
ORDINARY = np.arange(VOCAB) >= SPECIAL


def _tokens(length: int = 200_000) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCAB, length)


def _masks(**changes: object) -> MaskedLanguageModel:
    settings: dict = {"seed": 3, "probability": 0.2, "scheme": "80/10/10", "mask_id": MASK, "ordinary": ORDINARY}
    return MaskedLanguageModel(**settings | changes)


@pytest.mark.parametrize("probability", [0.15, 0.2, 0.3])
def test_rates_of_80_10_10(probability: float) -> None:
    tokens = _tokens()
    input_ids, labels = _masks(probability=probability).apply(tokens, row_id=11)
    ordinary = ORDINARY[tokens]
    chosen = labels != -100
    count = chosen.sum()
    # five standard deviations of the binomial
    n = ordinary.sum()
    assert abs(count - probability * n) < 5 * np.sqrt(n * probability * (1 - probability))
    masked = (input_ids == MASK) & chosen
    changed = chosen & ~masked & (input_ids != tokens)
    for share, expected in ((masked.sum() / count, 0.8), (changed.sum() / count, 0.1 * (1 - 1 / ORDINARY.sum()))):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    # random ids: only ordinary ones, and all of them about equally often
    drawn = np.bincount(input_ids[changed], minlength=VOCAB)
    assert drawn[:SPECIAL].sum() == 0
    expected_draws = changed.sum() / ORDINARY.sum()
    assert drawn[SPECIAL:].min() > 0
    assert drawn.max() < expected_draws + 6 * np.sqrt(expected_draws)


@pytest.mark.parametrize("scheme", ["80/10/10", "all"])
def test_labels_and_untouched_tokens(scheme: str) -> None:
    tokens = _tokens(20_000)
    input_ids, labels = _masks(scheme=scheme).apply(tokens, row_id=5)
    chosen = labels != -100
    assert (labels[chosen] == tokens[chosen]).all()
    assert (input_ids[~chosen] == tokens[~chosen]).all()
    assert not (chosen & ~ORDINARY[tokens]).any()
    if scheme == "all":
        assert (input_ids[chosen] == MASK).all()


def test_a_mask_is_a_function_of_seed_and_row() -> None:
    tokens = _tokens(4096)
    first = _masks().apply(tokens, row_id=9)
    _masks().apply(tokens, row_id=10)
    again = _masks().apply(tokens, row_id=9)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], _masks().apply(tokens, row_id=10)[1])
    assert not np.array_equal(first[1], _masks(seed=4).apply(tokens, row_id=9)[1])


def test_the_drawn_masks_never_change() -> None:
    """Pinned: a resumed run draws the masks of the run it continues, whatever the version of numpy."""
    input_ids, labels = _masks(probability=0.6).apply(np.arange(100, 116), row_id=1)
    assert input_ids.tolist() == [100, 101, 102, 111, 4, 4, 4, 4, 108, 4, 110, 111, 4, 113, 4, 4]
    assert np.flatnonzero(labels != -100).tolist() == [3, 4, 5, 6, 7, 8, 9, 12, 14, 15]


def test_next_token_labels_stop_at_documents() -> None:
    tokens = np.array([2, 7, 8, 3, 2, 9, 3, 0, 0])
    labels = next_token_labels(tokens, np.array([4, 3]))
    assert labels.tolist() == [7, 8, 3, -100, 9, 3, -100, -100, -100]
    assert next_token_labels(np.array([5, 6]), np.array([1, 1])).tolist() == [-100, -100]


@pytest.mark.parametrize("bad", [{"scheme": "90/5/5"}, {"probability": 0.0}, {"probability": 1.0}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(DataError, match="mlm_"):
        _masks(**bad)
