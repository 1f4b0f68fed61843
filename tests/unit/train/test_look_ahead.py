"""An update is read while the one before it is under way; damage is told when its own turn has come."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from neomoba_dist.data.errors import DataError
from neomoba_dist.train.look_ahead import LookAhead


class Stream:
    """Two updates, then a damaged row."""

    skipped_rows = 0

    def __iter__(self) -> Iterator[Any]:
        for number in (1, 2):
            self.skipped_rows = 10 * number
            yield [SimpleNamespace(num_valid=100 * number, num_pairs=number)], {"rows": 8 * number}
        raise DataError("shard-00003.tar: damaged")


def test_the_state_is_that_of_the_update_taken() -> None:
    updates = LookAhead(Stream())  # type: ignore[arg-type]
    assert updates.fetch() >= 0.0
    first = updates.take()
    assert (updates.counted, updates.pairs) == (100, 1)
    updates.fetch()
    assert (first.state, first.skipped_rows) == ({"rows": 8}, 10)
    assert (updates.take().state, updates.take().skipped_rows, updates.counted) == ({"rows": 16}, 20, 200)
    updates.fetch()  # while the second one is under way, which is to end and to be saved
    assert (updates.counted, updates.pairs) == (0, 0)
    with pytest.raises(DataError, match="shard-00003"):
        updates.take()
    updates.close()
