"""The tokens of all shards as one long sequence, read through memory maps.

Tokens are numbered over the whole corpus, member after member. A member is checked when it is first touched: its tar
header, the crc32 of its payload, and that every id lies below the vocabulary.
"""

from __future__ import annotations

import mmap
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import CorpusIndex, MemberTable
from neomoba_dist.data.shards import REMAKE, TAR_BLOCK

_UNCHECKED, _GOOD, _BAD = 0, 1, 2


class TokenReader:
    """Reads tokens by their number in the corpus. `open_shard` gives the local file of the shard of a number."""

    def __init__(self, index: CorpusIndex, members: MemberTable, open_shard: Callable[[int], Path]) -> None:
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self._vocab_size = index.tokenizer.vocab_size
        self._members, self._open_shard = members, open_shard
        sizes = members.tokens_size // self.dtype.itemsize
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        # a token's place in its file, counted in ids: tar aligns payloads to blocks
        self._shift = members.tokens_offset // self.dtype.itemsize - self._starts
        self._state = np.full(len(sizes), _UNCHECKED, np.int8)
        self._problems: dict[int, str] = {}
        self._ids: dict[int, np.ndarray] = {}

    def read(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray) -> dict[int, str]:
        """Copies runs of tokens: `lengths[i]` of them, from number `starts[i]` on, to `out[places[i]:]`.

        All int64 [runs]; `out` is of `dtype`. Returns what is wrong with damaged runs by their number, with shard and
        offset; these are not copied whole.
        """
        run, member = self._members_of(starts, lengths)
        for unchecked in np.unique(member[self._state[member] == _UNCHECKED]).tolist():
            problem = self._member_problem(unchecked)
            self._state[unchecked] = _BAD if problem else _GOOD
            if problem:
                self._problems[unchecked] = problem
        damaged: dict[int, str] = {}
        if self._problems:
            good = self._state[member] == _GOOD
            damaged = {int(run[i]): self._problems[int(member[i])] for i in np.flatnonzero(~good)}
            run, member = run[good], member[good]

        first = np.maximum(starts[run], self._starts[member])
        count = np.minimum(starts[run] + lengths[run], self._ends[member]) - first
        place, begin = places[run] + first - starts[run], first + self._shift[member]
        columns = (self._members.shard[member], begin, count, place)
        for shard, b, n, p in zip(*(column.tolist() for column in columns), strict=True):
            out[p : p + n] = self._ids[shard][b : b + n]
        return damaged

    def check_first_members(self) -> None:
        """Looks at a few bytes of each shard that no other shard has there. DataError for one that was swapped."""
        members = self._members
        for member in np.unique(members.shard, return_index=True)[1].tolist():
            shard, offset = int(members.shard[member]), int(members.lengths_offset[member])
            path, size = self._map(shard), int(members.lengths_size[member])
            payload = self._ids[shard].view(np.uint8)[offset : offset + size]
            if zlib.crc32(payload.data) != int(members.lengths_crc32[member]):
                raise DataError(f"{path}: lengths at byte offset {offset} ({size} bytes) fail their crc32; {REMAKE}")

    def _members_of(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(run, member), int64 [parts]: nearly every run lies in one member; a long one is taken apart."""
        first = np.searchsorted(self._ends, starts, side="right")
        extra = np.searchsorted(self._ends, starts + lengths - 1, side="right") - first
        run = np.arange(len(starts))
        if not extra.any():
            return run, first
        run = np.repeat(run, extra + 1)
        within = np.arange(len(run)) - np.searchsorted(run, run)
        return run, first[run] + within

    def _member_problem(self, member: int) -> str | None:
        """What is wrong with one member, None if nothing is."""
        shard, offset = int(self._members.shard[member]), int(self._members.tokens_offset[member])
        size, crc32 = int(self._members.tokens_size[member]), int(self._members.tokens_crc32[member])
        path = self._map(shard)
        header, ids = (
            self._ids[shard][start // self.dtype.itemsize : stop // self.dtype.itemsize]
            for start, stop in ((offset - TAR_BLOCK, offset), (offset, offset + size))
        )
        if offset % TAR_BLOCK == 0:  # else the ids of foreign shards stand behind a header of their own
            try:
                named = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "surrogateescape").size
            except tarfile.HeaderError as error:
                return f"{path}: tar header at byte offset {offset - TAR_BLOCK} is damaged ({error}); {REMAKE}"
            if named != size:
                return f"{path}: tar header at byte offset {offset - TAR_BLOCK} says {named} bytes; {REMAKE}"
        if ids.nbytes != size or zlib.crc32(ids.data) != crc32:
            return f"{path}: tokens at byte offset {offset} ({size} bytes) fail their crc32; {REMAKE}"
        lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
        if lowest < 0 or highest >= self._vocab_size:
            return (
                f"{path}: ids from {lowest} to {highest} in the member at byte offset {offset}, but the vocabulary "
                f"has {self._vocab_size}; {REMAKE}"
            )
        return None

    def _map(self, shard: int) -> Path:
        """Maps a shard's whole file as ids, at its first use; returns its path."""
        path = self._open_shard(shard)
        if shard not in self._ids:
            with open(path, "rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._ids[shard] = np.frombuffer(whole, self.dtype, len(whole) // self.dtype.itemsize)
        return path
