"""The ranks that start together, as the data see them: what one of them can do for all is shared out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neomoba_dist.data.errors import AgreedError


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Job:
    """Rank `rank` of `size`; `gather` gives the small picklable value of every rank to all of them, in rank order."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def agree(self, problem: str | None, value: Any = None) -> list[Any]:
        """All ranks' values, or AgreedError on every rank with the first problem that a rank has."""
        told = self.gather((problem, value))
        for text in (text for text, _ in told if text):
            raise AgreedError(text)
        return [value for _, value in told]
