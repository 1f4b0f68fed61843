"""Random bits by number: the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), keyed by (seed, number).

Bits do not depend on what was drawn before, so not on the rank, the order of reading or a resume. Only raw words are
used: numpy promises to keep them fixed, and not its distributions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# the counter's last word keeps the uses of one key apart
CHOICES, ACTIONS, DROPOUT, ROWS, SHARDS, SPANS, PAIRS = range(7)


class Counter:
    """Random bits of one seed for one use. One object is moved from number to number, as making one costs more."""

    def __init__(self, seed: int, use: int) -> None:
        self._counter = np.array([0, 0, 0, use], np.uint64)
        self._key = np.array([seed, 0], np.uint64)
        self._philox = np.random.Philox(key=self._key)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def words(self, number: int, size: int) -> np.ndarray:
        """The first `size` words of a number: uint64 [size]."""
        self._key[1] = number
        self._philox.state = self._state
        return self._philox.random_raw(size)

    def bits(self, number: int, size: int, dtype: type[np.uint16] | type[np.uint32]) -> np.ndarray:
        """The same words cut into smaller ones, low bits first: `dtype` [size]."""
        per_word = 8 // np.dtype(dtype).itemsize
        return self.words(number, -(-size // per_word)).astype("<u8", copy=False).view(dtype)[:size]
