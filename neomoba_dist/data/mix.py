"""Mixing corpora: which source gives the row at each place of the run.

Tijdeman's schedule (1980, "The chairman assignment problem"): after n rows each of K sources has given its share of n
to within 1 - 1 / (2K - 2), less than one row, for every n. Weights are exact fractions, so the schedule repeats after
a period, and any place of a run is found without going through those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from neomoba_dist.data.errors import DataError

LONGEST_PERIOD = 100_000


class Schedule:
    """The source of each row, for sources of the given weights (positive; only their ratios count)."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        parts = _whole_parts(weights)
        self.period = sum(parts)
        if self.period > LONGEST_PERIOD:
            raise DataError(
                f"neomoba.data.train: the weights {', '.join(str(float(w)) for w in weights)} repeat only after "
                f"{self.period} rows; write them with fewer digits"
            )
        self._source = _tijdeman(parts)
        self._counts = np.array(parts, np.int64)
        self._earlier = np.zeros(self.period, np.int64)
        for source in range(len(parts)):
            mine = self._source == source
            self._earlier[mine] = np.arange(mine.sum())

    def sources_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, rows that it gave before) at `positions` int64 [n] of the run; each int64 [n]."""
        rounds, within = np.divmod(positions, self.period)
        source = self._source[within]
        return source, rounds * self._counts[source] + self._earlier[within]


def _whole_parts(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    parts = [int(weight * denominator) for weight in weights]
    return [part // math.gcd(*parts) for part in parts]


def _tijdeman(parts: Sequence[int]) -> np.ndarray:
    """Source of each row of one period: int64 [sum(parts)]. All arithmetic is in whole numbers."""
    sources, total = len(parts), sum(parts)
    if sources == 1:
        return np.zeros(1, np.int64)
    slack = 2 * sources - 2
    given = [0] * sources
    chosen = np.empty(total, np.int64)
    for n in range(1, total + 1):
        # what source i lacks, in units of 1 / (total * slack): slack * (n * parts_i - total * given_i)
        lacks = [slack * (n * part - total * count) for part, count in zip(parts, given, strict=True)]
        due = [i for i in range(sources) if lacks[i] >= total]
        # the earliest deadline: the row by which the source must have its next turn
        best = min(due, key=lambda i: Fraction(total * (slack - 1) - lacks[i], parts[i]))
        given[best] += 1
        chosen[n - 1] = best
    return chosen
