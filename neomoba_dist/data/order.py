"""Row order: a fresh permutation of all rows in each epoch, a pure function of (seed, epoch), any place of it at once.

The permutation is a Feistel network (Luby and Rackoff 1988) over the smallest square power of two that holds the
rows; what falls outside is sent through again until it falls inside ("cycle walking", Black and Rogaway 2002). It
needs no table, so the first row of a run, and of a resume at the end of an epoch, costs the same for any corpus.
"""

from __future__ import annotations

import numpy as np

from neomoba_dist.data.counter import ROWS, SHARDS, Counter

ROUNDS = 8
_CHUNK = 4096


class Permutation:
    """A permutation of range(size) drawn from round keys, uint64 [ROUNDS]."""

    def __init__(self, size: int, keys: np.ndarray) -> None:
        self.size = size
        self._half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = keys

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Where `positions` int64 [n], each in range(size), go: int64 [n]."""
        x = self._scramble(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(x >= self.size)):
            x[outside] = self._scramble(x[outside])
        return x.astype(np.int64)

    def _scramble(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._low)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RowOrder:
    """The order of a corpus's rows, epoch after epoch.

    `shard_ends` int64 [S]: rows up to the end of each shard. With `window` = w the shards come in a fresh order and
    rows are shuffled among w consecutive shards at a time, so that a run touches few shards at once; None shuffles
    over the whole corpus.
    """

    def __init__(self, shard_ends: np.ndarray, seed: int, window: int | None = None) -> None:
        self.rows = int(shard_ends[-1]) if len(shard_ends) else 0
        self.seed = seed
        self._starts = np.concatenate([[0], shard_ends])[:-1].astype(np.int64)
        self._sizes = np.diff(shard_ends, prepend=0).astype(np.int64)
        self._window = window
        self._epoch = -1
        self._chunk_size = max(1, min(_CHUNK, self.rows))
        self._chunk_number, self._chunk = -1, np.zeros(0, np.int64)

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at `positions` int64 [n] of the run, counted from 0 over all epochs: int64 [n]."""
        rows = np.empty_like(positions)
        chunk_of = positions // self._chunk_size
        for chunk in np.unique(chunk_of).tolist():
            if chunk != self._chunk_number:
                self._chunk_number, self._chunk = chunk, self._chunk_from(chunk * self._chunk_size)
            mine = chunk_of == chunk
            rows[mine] = self._chunk[positions[mine] - chunk * self._chunk_size]
        return rows

    def _chunk_from(self, first: int) -> np.ndarray:
        """Rows of a chunk of positions, which may lie in two epochs: drawn together they cost a microsecond each."""
        positions = np.arange(first, first + self._chunk_size)
        epochs, within = positions // self.rows, positions % self.rows
        return np.concatenate([self._rows(int(e), within[epochs == e]) for e in range(epochs[0], epochs[-1] + 1)])

    def _rows(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """Rows at positions `within` int64 [n] of one epoch."""
        if epoch != self._epoch:
            self._plan_epoch(epoch)
        rows = np.empty_like(within)
        window_of = np.searchsorted(self._window_ends, within, side="right")
        for window in np.unique(window_of):
            mine = window_of == window
            shards = self._windows[window]
            inside = self._permutations[window][within[mine] - (self._window_ends[window] - self._sizes[shards].sum())]
            ends = np.cumsum(self._sizes[shards])
            shard = np.searchsorted(ends, inside, side="right")
            rows[mine] = self._starts[shards][shard] + inside - (ends[shard] - self._sizes[shards][shard])
        return rows

    def _plan_epoch(self, epoch: int) -> None:
        """The windows of an epoch, each with its permutation."""
        shards = np.arange(len(self._sizes))
        size = self._window or max(1, len(shards))
        if size < len(shards):
            shards = np.argsort(Counter(self.seed, SHARDS).words(epoch, len(shards)), kind="stable")
        self._windows = [shards[i : i + size] for i in range(0, len(shards), size)]
        rows = np.array([self._sizes[window].sum() for window in self._windows])
        self._window_ends = np.cumsum(rows)
        keys = Counter(self.seed, ROWS).words(epoch, ROUNDS * len(rows)).reshape(-1, ROUNDS)
        self._permutations = [Permutation(int(n), k) for n, k in zip(rows, keys, strict=True)]
        self._epoch = epoch
