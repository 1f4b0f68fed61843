"""Metrics of the tasks on whole texts, against numbers computed by hand."""

import numpy as np
import pytest

from neomoba_dist.config.text_tasks import TEXT_TASKS
from neomoba_dist.train.text_scores import scores


def one_hot(classes: list[int], number: int) -> np.ndarray:
    return np.eye(number)[classes]


def test_classes() -> None:
    guess, truth = [1, 1, 1, 0, 0, 0], np.array([1, 1, 0, 0, 0, 1])  # tp 2, fp 1, tn 2, fn 1
    assert scores(TEXT_TASKS["sst2"], one_hot(guess, 2), truth) == pytest.approx({"accuracy": 4 / 6})
    assert scores(TEXT_TASKS["mrpc"], one_hot(guess, 2), truth) == pytest.approx({"f1": 4 / 6, "accuracy": 4 / 6})
    assert scores(TEXT_TASKS["cola"], one_hot(guess, 2), truth) == pytest.approx({"matthews": (4 - 1) / 9})
    assert scores(TEXT_TASKS["cola"], one_hot([1] * 6, 2), truth) == {"matthews": 0.0}


def test_correlations() -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    found = scores(TEXT_TASKS["stsb"], np.array([[1.0], [8.0], [27.0], [64.0]]), truth)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 8, 27, 64], truth)[0, 1])
    assert scores(TEXT_TASKS["stsb"], np.ones((4, 1)), truth) == {"pearson": 0.0, "spearman": 0.0}


def test_retrieval() -> None:
    """Queries and their positives are the same axis, but for the last; negatives are no one's."""
    axes = np.eye(8)
    vectors = np.stack([axes[i] for i in (0, 0, 5, 1, 1, 6, 2, 3, 2)])
    assert scores(TEXT_TASKS["contrastive"], vectors, np.zeros(3)) == pytest.approx({"retrieval": 2 / 3})
