"""Packing: every token in exactly one row, bounded rows, little padding, quickly."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.data.pack import Packing, RowPlan, plan_rows


def _plan(lengths: list[int] | np.ndarray, length: int, max_documents: int, **options: object) -> RowPlan:
    sizes = np.array(lengths, np.int64)
    packing = Packing(length=length, max_documents=max_documents, **options)  # type: ignore[arg-type]
    return plan_rows(np.cumsum(sizes) - sizes, sizes, packing)


@pytest.mark.parametrize("method", ["best_fit", "concat"])
@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=80),
    blocks=st.integers(1, 16),
    align=st.sampled_from([1, 1, 4, 8]),
    max_documents=st.integers(1, 9),
)
def test_every_token_is_in_exactly_one_row(
    method: str, lengths: list[int], blocks: int, align: int, max_documents: int
) -> None:
    length = blocks * 8
    plan = _plan(lengths, length, max_documents, method=method, align=align)
    seen = np.zeros(sum(lengths), np.int64)
    ends = np.cumsum(np.array(lengths, np.int64))
    for row in range(plan.rows):
        pieces = range(plan.row_starts[row], plan.row_starts[row + 1])
        assert 1 <= len(pieces) <= max_documents
        sizes = plan.piece_length[pieces.start : pieces.stop]
        assert (-(-sizes // align) * align).sum() <= length
        for piece in pieces:
            start, size = int(plan.piece_start[piece]), int(plan.piece_length[piece])
            seen[start : start + size] += 1
            # a piece stays inside one document
            assert np.searchsorted(ends, start, side="right") == np.searchsorted(ends, start + size - 1, side="right")
    assert (seen == 1).all()


def test_whole_documents_are_not_cut_however_empty_rows_stay() -> None:
    lengths = np.array([5, 6, 9, 7, 2, 8, 3], np.int64)
    packing = Packing(length=8, max_documents=16, method="whole")
    kept = packing.takes(lengths)
    assert kept.tolist() == [True, True, False, True, True, True, True]
    plan = plan_rows((np.cumsum(lengths) - lengths)[kept], lengths[kept], packing)
    assert sorted(plan.piece_length.tolist()) == [2, 3, 5, 6, 7, 8]
    assert plan.row_starts.tolist() == [0, 1, 2, 4, 6]
    assert Packing(length=8, max_documents=16).takes(lengths).all()


def test_concat_fills_rows_in_document_order() -> None:
    plan = _plan([5, 9, 3, 2], 8, 16, method="concat")
    assert plan.row_starts.tolist() == [0, 2, 4, 6]
    assert plan.piece_start.tolist() == [0, 5, 8, 14, 16, 17]
    assert plan.piece_length.tolist() == [5, 3, 6, 2, 1, 2]
    aligned = _plan([5, 9, 3, 2], 8, 16, method="concat", align=4)
    assert aligned.row_starts.tolist() == [0, 1, 2, 4, 5]
    assert aligned.piece_length.tolist() == [5, 8, 1, 3, 2]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=200), length=st.integers(16, 1024))
def test_all_rows_but_one_are_full(lengths: list[int], length: int) -> None:
    plan = _plan(lengths, length, max_documents=1000)
    used = np.add.reduceat(plan.piece_length, plan.row_starts[:-1])
    assert (used < length - length // 256).sum() <= 1
    assert plan.rows == _plan(lengths, length, max_documents=1000, method="concat").rows or (used < length).any()


def _web_like(documents: int) -> np.ndarray:
    words = np.random.default_rng(0).lognormal(6.1, 1.0, documents)
    return np.clip(words, 8, 100_000).astype(np.int64)


@pytest.mark.parametrize(("length", "padding"), [(1024, 0.0005), (4096, 0.0005), (32768, 0.003)])
def test_web_like_documents_pack_almost_without_padding(length: int, padding: float) -> None:
    lengths = _web_like(20_000)
    plan = _plan(lengths, length, max_documents=1024)
    assert 1 - lengths.sum() / (plan.rows * length) < padding


@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_documents_that_fit_into_a_row_are_hardly_ever_cut(length: int) -> None:
    lengths = _web_like(20_000)
    cuts = {
        method: len(_plan(lengths, length, 1024, method=method).piece_length) - (-(-lengths // length)).sum()
        for method in ("best_fit", "concat")
    }
    assert cuts["best_fit"] < 0.01 * len(lengths)
    assert cuts["best_fit"] < 0.1 * cuts["concat"]


@pytest.mark.parametrize(("length", "least"), [(4096, 1024), (4096, 2048), (32768, 8192)])
def test_subsets_of_long_documents_pack_without_padding_too(length: int, least: int) -> None:
    """Best fit alone would leave 5 %, 22 % and 9 % of the positions empty: nothing is short enough to fill them."""
    lengths = _web_like(100_000)
    kept = lengths[lengths >= least]
    plan = _plan(kept, length, max_documents=512)
    assert 1 - kept.sum() / (plan.rows * length) < 0.005


def test_no_documents() -> None:
    assert _plan([], 16, 4).rows == 0
    assert _plan([], 16, 4, method="concat").rows == 0


def test_plan_of_known_documents_is_what_it_was() -> None:
    """Rows are named by their number: another plan gives a resumed run other rows. Digests of the loops in Python."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6.1, 1.0, 20_000), 8, 100_000).astype(np.int64)
    found = {}
    for length, method, align in ((1024, "best_fit", 1), (4096, "best_fit", 512), (4096, "concat", 1)):
        plan = _plan(lengths, length, 64, method=method, align=align)
        columns = (column.astype("<i8").tobytes() for column in vars(plan).values())
        found[f"{method} {length} {align}"] = hashlib.sha256(b"".join(columns)).hexdigest()[:16]
    assert found == {
        "best_fit 1024 1": "f73662f19fda93bf",
        "best_fit 4096 512": "76199b5d7fb52e10",
        "concat 4096 1": "69d01f8049ad7836",
    }


def test_planning_keeps_pace() -> None:
    """100,000 documents in a tenth of a second, where the loops in Python took 0.1 to 0.3 s: 0.2 us each, and less."""
    lengths = _web_like(100_000)
    _plan(lengths[:10], 4096, max_documents=128)  # compiles, or loads what was compiled
    seconds = []
    for _ in range(3):
        began = time.process_time()
        _plan(lengths, 4096, max_documents=128)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.02
