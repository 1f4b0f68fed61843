"""What a rank has communicated, in calls, bytes and seconds by axis and operation, and what it is waiting for now."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from neomoba_dist.errors import FailedError


class CommunicationError(FailedError, RuntimeError):
    """A collective failed or timed out; the message names the operation, the axis and the ranks."""


@dataclass
class Entry:
    """Running totals of one (axis, operation): calls, bytes received by this rank, seconds on the host."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """What this rank has communicated, by (axis, operation), and what it is waiting for now."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    pending: str | None = None

    def received(self) -> dict[str, int]:
        """Bytes so far, by axis."""
        totals: dict[str, int] = {}
        for (axis, _), entry in self.entries.items():
            totals[axis] = totals.get(axis, 0) + entry.bytes
        return totals

    @contextmanager
    def record(self, rank: int, axis: str, ranks: Sequence[int], operation: str, num_bytes: int) -> Iterator[None]:
        """Count one call of `rank`, and say in a failure who waited for whom. ranks: those of the axis."""
        entry = self.entries.setdefault((axis, operation), Entry())
        self.pending = f"{operation} over {axis} (ranks {list(ranks)}, {num_bytes} bytes)"
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise CommunicationError(f"rank {rank}: {self.pending} failed: {error}") from error
        entry.calls += 1
        entry.bytes += num_bytes
        entry.seconds += time.perf_counter() - start
        self.pending = None
