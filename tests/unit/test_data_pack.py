"""Packing: every token in exactly one row, bounded rows, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.data.pack import plan_rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=80),
    length=st.integers(1, 128),
    max_documents=st.integers(1, 9),
)
def test_every_token_is_in_exactly_one_row(lengths: list[int], length: int, max_documents: int) -> None:
    plan = plan_rows(np.array(lengths, np.int64), length, max_documents)
    seen = np.zeros(sum(lengths), np.int64)
    ends = np.cumsum(np.array(lengths, np.int64))
    for row in range(plan.rows):
        pieces = range(plan.row_starts[row], plan.row_starts[row + 1])
        assert 1 <= len(pieces) <= max_documents
        assert plan.piece_length[pieces.start : pieces.stop].sum() <= length
        for piece in pieces:
            start, size = int(plan.piece_start[piece]), int(plan.piece_length[piece])
            seen[start : start + size] += 1
            # a piece stays inside one document
            assert np.searchsorted(ends, start, side="right") == np.searchsorted(ends, start + size - 1, side="right")
    assert (seen == 1).all()
    # long documents are cut only into whole rows and one rest
    assert len(plan.piece_length) == sum(-(-n // length) for n in lengths)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=200), length=st.integers(16, 128))
def test_no_two_rows_would_fit_into_one(lengths: list[int], length: int) -> None:
    plan = plan_rows(np.array(lengths, np.int64), length, max_documents=1000)
    used = np.add.reduceat(plan.piece_length, plan.row_starts[:-1])
    assert plan.rows < 2 or np.sort(used)[:2].sum() > length


@pytest.mark.parametrize(("length", "padding"), [(1024, 0.0005), (4096, 0.0005), (32768, 0.003)])
def test_web_like_documents_pack_almost_without_padding(length: int, padding: float) -> None:
    words = np.random.default_rng(0).lognormal(6.1, 1.0, 20_000)
    lengths = np.clip(words, 8, 100_000).astype(np.int64)
    plan = plan_rows(lengths, length, max_documents=1024)
    assert 1 - lengths.sum() / (plan.rows * length) < padding


def test_no_documents() -> None:
    assert plan_rows(np.zeros(0, np.int64), 16, 4).rows == 0
