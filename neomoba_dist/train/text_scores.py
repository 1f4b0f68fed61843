"""How the tasks on whole texts are judged, as published: by scikit-learn and scipy, on outputs of all documents."""

from __future__ import annotations

import math

import numpy as np

from neomoba_dist.config.text_tasks import TextTask


def predictions(task: TextTask, outputs: np.ndarray) -> np.ndarray:
    """Class numbers int64 [n], or scores float [n], of outputs float [n, K]."""
    return outputs.argmax(1) if task.labels else outputs[:, 0]


def scores(task: TextTask, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of the task, between 0 (or -1) and 1. outputs float [n, K]; labels [n]: classes or scores.

    An embedder's outputs are the vectors of n / 2 or n / 3 groups of documents in a row, labels are not read.
    """
    if task.embeds:
        return retrieval(outputs, len(outputs) // max(1, len(labels)))
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess = predictions(task, outputs)
    measures = {
        "accuracy": lambda: accuracy_score(labels, guess),
        "f1": lambda: f1_score(labels, guess, zero_division=0.0),
        "matthews": lambda: matthews_corrcoef(labels, guess),
        "pearson": lambda: _correlation(pearsonr, guess, labels),
        "spearman": lambda: _correlation(spearmanr, guess, labels),
    }
    return {name: float(measures[name]()) for name in task.metrics}


def _correlation(measure: object, guess: np.ndarray, labels: np.ndarray) -> float:
    """0 where one side is constant, as it is before the first useful step."""
    if np.ptp(guess) == 0 or np.ptp(labels) == 0:
        return 0.0
    value = float(measure(guess, labels)[0])  # type: ignore[operator]
    return 0.0 if math.isnan(value) else value


def retrieval(vectors: np.ndarray, width: int) -> dict[str, float]:
    """Share of queries whose positive is the nearest of all documents that are no queries.

    vectors float [n * width, H]: query, positive and maybe a negative, again and again.
    """
    number = np.arange(len(vectors))
    queries, others = vectors[number % width == 0], vectors[number % width != 0]
    nearest = (queries @ others.T).argmax(1)
    return {"retrieval": float((nearest == np.arange(len(queries)) * (width - 1)).mean())}
