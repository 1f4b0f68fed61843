"""Order and mixing: permutations, windows of shards, shares that hold at every row."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.data.counter import ROWS, Counter
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.mix import Schedule
from neomoba_dist.data.order import ROUNDS, Permutation, RowOrder


def _permutation(size: int, seed: int = 1) -> np.ndarray:
    return Permutation(size, Counter(seed, ROWS).words(0, ROUNDS))[np.arange(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 70_001])
def test_a_permutation_holds_every_row_once(size: int) -> None:
    assert sorted(_permutation(size).tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    size = 50_000
    row = _permutation(size)
    for shifted in (np.arange(size), np.roll(row, 1), np.roll(row, 2), _permutation(size, 2)):
        assert abs(np.corrcoef(row, shifted)[0, 1]) < 5 / np.sqrt(size)
    assert (row == np.arange(size)).sum() < 10
    # over many seeds every row comes first, about equally often; and all 6 orders of 3 rows occur
    first = np.bincount([int(_permutation(10, seed)[0]) for seed in range(3000)], minlength=10)
    assert abs(first - 300).max() < 5 * np.sqrt(300)
    orders = [tuple(_permutation(3, seed).tolist()) for seed in range(600)]
    assert all(60 < orders.count(order) < 140 for order in set(orders))
    assert len(set(orders)) == 6


def test_any_place_is_found_alone() -> None:
    """The millionth row of a corpus of a billion costs no more than the first."""
    ends = np.cumsum([400_000_000, 600_000_000])
    places = np.array([0, 1_000_000, 999_999_999, 10**9, 5 * 10**9 + 3])
    together = RowOrder(ends, 7).rows_at(places)
    assert together.tolist() == [int(RowOrder(ends, 7).rows_at(places[i : i + 1])[0]) for i in range(5)]
    assert ((together >= 0) & (together < 10**9)).all()


def test_epochs_and_seeds_differ() -> None:
    order, other = RowOrder(np.array([500]), 1), RowOrder(np.array([500]), 2)
    first, second = order.rows_at(np.arange(500)), order.rows_at(np.arange(500, 1000))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(500))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.rows_at(np.arange(500)))


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_windows_touch_few_shards_at_a_time(window: int) -> None:
    sizes = [30, 0, 50, 7, 40, 21, 9]
    ends = np.cumsum(sizes)
    order = RowOrder(ends, 3, window)
    starts_of_epochs = []
    for epoch in range(3):
        rows = order.rows_at(np.arange(epoch * ends[-1], (epoch + 1) * ends[-1]))
        assert sorted(rows.tolist()) == list(range(ends[-1]))
        shards = np.searchsorted(ends, rows, side="right")
        spans = [np.flatnonzero(shards == shard) for shard in range(7)]
        met = [span[-1] - span[0] + 1 for span in spans if len(span)]
        assert max(met) <= sum(sorted(sizes)[-min(window, 7) :])
        starts_of_epochs.append(shards[: sizes[0]].tolist())
    assert starts_of_epochs[0] != starts_of_epochs[1]


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 400), min_size=1, max_size=9))
def test_every_source_has_its_share_at_every_row(weights: list[int]) -> None:
    schedule = Schedule([Fraction(weight, 100) for weight in weights])
    total = sum(weights)
    rows = np.arange(2 * schedule.period + 3)
    source, earlier = schedule.sources_at(rows)
    for i, weight in enumerate(weights):
        given_before = np.cumsum(source == i) - (source == i)
        assert np.array_equal(earlier[source == i], given_before[source == i])
        assert np.abs(given_before - rows * weight / total).max() < 1


def test_any_position_of_a_mixture_is_found_alone() -> None:
    schedule = Schedule([Fraction("0.2"), Fraction("0.4"), Fraction("0.4")])
    assert schedule.period == 5
    source, earlier = schedule.sources_at(np.array([10**12, 10**12 + 1]))
    assert (earlier // 10**10).tolist() == [20 if s == 0 else 40 for s in source.tolist()]
    assert source.tolist() == schedule.sources_at(np.array([0, 1]))[0].tolist()


def test_weights_that_hardly_repeat_are_refused() -> None:
    with pytest.raises(DataError, match=r"neomoba.data.train: the weights 0.3141592, 1.0 .* write them with fewer"):
        Schedule([Fraction("0.3141592"), Fraction(1)])
