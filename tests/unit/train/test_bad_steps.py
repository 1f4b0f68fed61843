"""Which updates are refused, and that a judge that was stopped and started again judges alike."""

import json
import math
import random

import numpy as np
import pytest

from neomoba_dist.config.schema import HealthConfig
from neomoba_dist.train.bad_steps import WINDOW, StepJudge


def judge_after(pairs: list[tuple[float, float]], sigma: float = 6.0) -> StepJudge:
    judge = StepJudge(HealthConfig(spike_sigma=sigma))
    for loss, norm in pairs:
        judge.record(loss, norm, skipped=False)
    return judge


@pytest.fixture(scope="module")
def pairs() -> list[tuple[float, float]]:
    numbers = random.Random(0)
    return [(numbers.gauss(3.0, 0.1), numbers.gauss(1.0, 0.2)) for _ in range(WINDOW + 50)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float) -> None:
    judge = StepJudge(HealthConfig())
    assert judge.problem(3.0, 1.0) is None
    assert judge.problem(bad, 1.0) == f"the loss is {bad}"
    assert judge.problem(3.0, bad) == f"the gradient norm is {bad}"


def test_spikes_are_measured_against_the_last_steps(pairs: list[tuple[float, float]]) -> None:
    judge = judge_after(pairs)
    for place, name in ((0, "loss"), (1, "gradient norm")):
        last = [pair[place] for pair in pairs[-WINDOW:]]
        limit = np.mean(last) + 6 * np.std(last)
        for factor, refused in ((1 - 1e-9, False), (1 + 1e-9, True)):
            values = list(pairs[-1])
            values[place] = float(limit * factor)
            problem = judge.problem(values[0], values[1])
            assert (problem is not None) == refused
            assert not refused or problem.startswith(f"the {name} {limit:.4g} is more than 6 sigma above")
    assert judge.problem(0.0, 0.0) is None  # only upwards


def test_no_spike_before_the_window_is_full_nor_with_the_limit_off(pairs: list[tuple[float, float]]) -> None:
    assert judge_after(pairs[: WINDOW - 1]).problem(1e6, 1e6) is None
    assert judge_after(pairs[:WINDOW]).problem(1e6, 1e6) is not None
    assert judge_after(pairs, sigma=0.0).problem(1e6, 1e6) is None
    assert judge_after(pairs, sigma=0.0).problem(math.nan, 1.0) is not None


def test_a_rise_that_lasts_is_taken_after_a_few_steps() -> None:
    judge = judge_after([(3.0, 0.4)] * WINDOW)
    for rise in (4.0, 1e4):
        for _ in range(20):
            skipped = judge.problem(3.0, rise) is not None
            judge.record(3.0, rise, skipped=skipped)
            if not skipped:
                break
        assert not skipped
    assert judge.skipped <= 10


def test_skipped_steps_are_counted_and_only_finite_ones_measured(pairs: list[tuple[float, float]]) -> None:
    judge, other = judge_after(pairs), judge_after(pairs)
    for number in range(3):
        judge.record(math.nan, 1e6, skipped=True)
        assert (judge.skipped, judge.in_a_row) == (number + 1, number + 1)
    assert judge.problem(1e3, 1.0) == other.problem(1e3, 1.0)
    judge.record(3.0, 1.0, skipped=False)
    assert (judge.skipped, judge.in_a_row) == (3, 0)


@pytest.mark.parametrize("number", [0, 5, WINDOW + 50])
def test_state_survives_json(pairs: list[tuple[float, float]], number: int) -> None:
    judge = judge_after(pairs[:number])
    judge.record(math.inf, 1.0, skipped=True)
    again = StepJudge(HealthConfig())
    again.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert again.state_dict() == judge.state_dict()
    assert again.problem(1e3, 1.0) == judge.problem(1e3, 1.0)
