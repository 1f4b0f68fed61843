"""The stream of updates, one ahead of training.

How many tokens count in an update is known over all ranks before it begins, without a collective of its own: each
rank's number travels with the update before. On a GPU the batch is made while the device computes.
"""

import time
from typing import Any, NamedTuple

from neomoba_dist.data.batch import Batch
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.examples import ExampleStream
from neomoba_dist.data.stream import UpdateStream


class Update(NamedTuple):
    """Micro-batches of this rank, the stream's state after them, and how many damaged rows all ranks left out."""

    batches: list[Batch]
    state: Any
    skipped_rows: int


class LookAhead:
    """counted, pairs: valid tokens and labelled pairs of this rank in what was fetched last."""

    def __init__(self, stream: UpdateStream | ExampleStream) -> None:
        self._stream, self._updates = stream, iter(stream)
        self._next: Update | DataError | None = None
        self.counted = self.pairs = 0

    def fetch(self) -> float:
        """Read the next update; how many seconds that took.

        Damage is told when that update is taken: the one under way shall end, and be saved.
        """
        started = time.perf_counter()
        try:
            batches, state = next(self._updates)
            self._next = Update(batches, state, self._stream.skipped_rows)
            self.counted, self.pairs = batches[0].num_valid, batches[0].num_pairs
        except DataError as error:
            self._next, self.counted, self.pairs = error, 0, 0
        return time.perf_counter() - started

    def take(self) -> Update:
        """What was fetched last. DataError if it is damaged."""
        if isinstance(self._next, DataError):
            raise self._next
        assert self._next is not None
        return self._next

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._updates.close()
