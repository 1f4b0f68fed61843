"""Row plans: the same for any way of making them, whole after any kill, shared by jobs and ranks, never held."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from neomoba_dist.data import plan as module
from neomoba_dist.data.errors import AgreedError, DataError
from neomoba_dist.data.job import Job
from neomoba_dist.data.pack import Packing, plan_rows
from neomoba_dist.data.plan import ROWS_FILE, CorpusPlan, Planner, corpus_plan
from neomoba_dist.data.stored import Columns, map_arrays, write_shared
from tests.jobs import run_job

PACKING = Packing(length=1024, max_documents=64)
SHARDS = [300, 0, 500, 1, 0, 900, 250, 49]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_DOCUMENTS", 400)


def _planner(seed: int = 0, **options: object) -> Planner:
    """Of a corpus of eight shards, in three parts."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.1, 1.0, sum(SHARDS)), 8, 9000).astype(np.int64)
    ends = np.cumsum(SHARDS)
    tokens = np.array([lengths[end - count : end].sum() for end, count in zip(ends, SHARDS, strict=True)])
    settings: dict = {"fingerprint": "f", "packing": PACKING} | options
    return Planner(
        shard_documents=np.array(SHARDS),
        shard_tokens=tokens,
        lengths=lambda first, last: lengths[first:last],
        **settings,
    )


def _rows(plan: CorpusPlan, packing: Packing = PACKING) -> list[np.ndarray]:
    """All that a reader learns of a plan, its rows backwards."""
    pieces = plan.pieces(np.arange(plan.rows)[::-1], packing)
    return [plan.shard_ends, plan.totals, *pieces]


def _equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("least", [0, 600])
def test_a_plan_is_that_of_its_shards(least: int) -> None:
    planner = _planner(min_length=least)
    assert planner.parts == [(0, 3), (3, 6), (6, 8)]
    plan = corpus_plan(planner, None, Job())
    row, place, start, length = plan.pieces(np.arange(plan.rows), PACKING)
    document = token = first_row = 0
    for shard, count in enumerate(SHARDS):
        lengths = planner.lengths(document, document + count)
        starts = token + np.cumsum(lengths) - lengths
        alone = plan_rows(starts[lengths >= least], lengths[lengths >= least], PACKING)
        assert plan.shard_ends[shard] == first_row + alone.rows
        mine = (row >= first_row) & (row < first_row + alone.rows)
        assert np.array_equal(start[mine], alone.piece_start)
        assert np.array_equal(length[mine], alone.piece_length)
        document, token, first_row = document + count, token + int(lengths.sum()), first_row + alone.rows
    kept = planner.lengths(0, sum(SHARDS))
    kept = kept[kept >= least]
    assert plan.totals.tolist() == [kept.sum(), len(kept)]
    assert (place[np.flatnonzero(np.diff(row, prepend=-1))] == 0).all()


def test_a_cached_plan_is_mapped_and_equal(tmp_path: Path) -> None:
    planner = _planner()
    fresh = _rows(corpus_plan(planner, None, Job()))
    assert _equal(_rows(corpus_plan(planner, tmp_path, Job())), fresh)

    # the second time nothing is planned: no length is looked at
    def never(first: int, last: int) -> np.ndarray:
        raise AssertionError

    object.__setattr__(planner, "lengths", never)
    plan = corpus_plan(planner, tmp_path, Job())
    assert _equal(_rows(plan), fresh)
    assert not plan.part(0).piece_start.flags.owndata
    for changed in ({"fingerprint": "g"}, {"packing": Packing(length=512, max_documents=64)}, {"min_length": 500}):
        other = _planner(**changed)
        assert _equal(_rows(corpus_plan(other, tmp_path, Job()), other.packing), fresh) == ("fingerprint" in changed)
    assert len(list((tmp_path / "plans").iterdir())) == 4


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_share_a_plan_out(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = Planner.make
    monkeypatch.setattr(Planner, "make", lambda self, part: (made.append(part), make(self, part))[1])
    plans = run_job(ranks, lambda job: corpus_plan(_planner(), tmp_path, job))
    assert sorted(made) == [0, 1, 2]  # each part once
    expected = _rows(corpus_plan(_planner(), None, Job()))
    assert all(_equal(_rows(plan), expected) for plan in plans)


def test_machines_with_a_cache_each_fill_up_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "a", 1: "a", 2: "b", 3: "b"}
    monkeypatch.setattr(module.socket, "gethostname", lambda: names[int(threading.current_thread().name)])
    found = run_job(4, lambda job: corpus_plan(_planner(), tmp_path / names[job.rank], job))
    expected = _rows(corpus_plan(_planner(), None, Job()))
    assert all(_equal(_rows(plan), expected) for plan in found)
    for name in "ab":
        assert len(list((tmp_path / name / "plans").rglob("*"))) == 5  # the folder, three parts, the rows


def test_what_one_rank_cannot_make_all_ranks_learn(tmp_path: Path) -> None:
    broken = _planner()
    broken.shard_tokens[5] += 1
    found = run_job(3, lambda job: corpus_plan(broken if job.rank == 1 else _planner(), tmp_path, job))
    assert all(isinstance(error, AgreedError) for error in found)
    assert len({str(error) for error in found}) == 1
    assert "shard 5 of the corpus has" in str(found[0])


def _make_slowly(cache: Path, delay: float) -> None:
    """Makes a plan, waiting a little before every write and rename."""
    replace, write = Path.replace, module.write_shared
    module.write_shared = lambda *arguments: (time.sleep(delay), write(*arguments))  # type: ignore[assignment]
    Path.replace = lambda *arguments: (time.sleep(delay), replace(*arguments))[1]  # type: ignore[method-assign]
    corpus_plan(_planner(), cache, Job())
    os._exit(0)


def test_killed_anywhere_and_started_again(tmp_path: Path) -> None:
    """Kills at 24 points of the work, in one cache after the other, half of the time with a second job beside."""
    expected = _rows(corpus_plan(_planner(), None, Job()))
    context = multiprocessing.get_context("fork")
    left_behind = 0
    for number in range(24):
        cache = tmp_path / str(number)
        jobs = [context.Process(target=_make_slowly, args=(cache, 0.005)) for _ in range(1 + number % 2)]
        for job in jobs:
            job.start()
        time.sleep(0.004 * number)
        assert jobs[0].pid is not None
        os.kill(jobs[0].pid, signal.SIGKILL)
        for job in jobs:
            job.join(30)
        finished = list(cache.rglob(ROWS_FILE))
        left_behind += not finished
        assert _equal(_rows(corpus_plan(_planner(), cache, Job())), expected)
        if not finished:
            assert not list(cache.rglob(".*.tmp"))
    assert left_behind >= 3


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    planner = _planner()
    corpus_plan(planner, tmp_path, Job())
    path = planner.file(planner.folder(tmp_path), 1)
    path.write_bytes(path.read_bytes()[:500])
    plan = corpus_plan(planner, tmp_path, Job())
    with pytest.raises(DataError, match=r"part-00001: damaged row plan \(.*\); remove the folder"):
        plan.pieces(np.arange(plan.rows), PACKING)


def test_arrays_come_back_from_disk(tmp_path: Path) -> None:
    arrays = [np.arange(5), np.zeros(0, np.int64), np.arange(3, dtype=np.int32), np.arange(70_000)]
    write_shared(tmp_path / "a", arrays)
    assert _equal(map_arrays(tmp_path / "a"), arrays)
    assert all(array.flags.aligned for array in map_arrays(tmp_path / "a"))
    np.savez(tmp_path / "table.npz", first=arrays[3], second=arrays[2])
    columns = Columns(tmp_path / "table.npz")
    assert columns.length("first") == 70_000
    assert columns.read("second", 1, 3).tolist() == [1, 2]
    assert np.array_equal(columns.mapped("first"), arrays[3])
    np.savez_compressed(tmp_path / "packed.npz", first=arrays[3])
    with pytest.raises(ValueError, match="compressed"):
        Columns(tmp_path / "packed.npz")
