"""The tokens of all shards as one long sequence, read through memory maps.

Tokens are numbered over the whole corpus, member after member. A member is checked when it is first touched: its tar
header, the crc32 of its payload, and that every id lies below the vocabulary.
"""

from __future__ import annotations

import mmap
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from neomoba_dist.data.index import CorpusIndex, MemberTable
from neomoba_dist.data.shards import REMAKE, TAR_BLOCK
from neomoba_dist.data.stored import MOST_MAPS, fetch, map_file

CHECKERS = 8  # members that are looked at at a time
_UNCHECKED, _GOOD, _BAD = 0, 1, 2


@dataclass(frozen=True)
class _Shard:
    """A mapped shard. Its tokens are numbered as in the corpus; arrays [members]."""

    path: Path
    whole: mmap.mmap
    ids: np.ndarray
    table: MemberTable
    starts: np.ndarray
    ends: np.ndarray
    shift: np.ndarray  # from a token's number to its place in the file, counted in ids: tar aligns payloads to blocks
    state: np.ndarray


class TokenReader:
    """Reads tokens by their number in the corpus.

    `open_shard` gives the local file of the shard of a number, `members` the members of it; `maps` shards are mapped
    at once, those that were used last.
    """

    def __init__(
        self,
        index: CorpusIndex,
        members: Callable[[int], MemberTable],
        open_shard: Callable[[int], Path],
        maps: int = MOST_MAPS,
    ) -> None:
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self._vocab_size = index.tokenizer.vocab_size
        self._members, self._open_shard, self._maps = members, open_shard, maps
        tokens = np.array([shard.tokens for shard in index.shards], np.int64)
        self._ends = np.cumsum(tokens)
        self._starts = self._ends - tokens
        self._states: dict[int, np.ndarray] = {}  # of the members, by shard: checked once, whatever is mapped
        self._problems: dict[tuple[Path, int], str] = {}
        self._shard = lru_cache(maps)(self._map)

    def read(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray) -> dict[int, str]:
        """Copies runs of tokens: `lengths[i]` of them, from number `starts[i]` on, to `out[places[i]:]`.

        All int64 [runs]; `out` is of `dtype`. Returns what is wrong with damaged runs by their number, with shard and
        offset; these are not copied whole.
        """
        run, shard = _parts(self._ends, starts, lengths)
        first = np.maximum(starts[run], self._starts[shard])
        count = np.minimum(starts[run] + lengths[run], self._ends[shard]) - first
        place = places[run] + first - starts[run]
        damaged: dict[int, str] = {}
        shards = np.unique(shard)
        for group in (shards[i : i + self._maps] for i in range(0, len(shards), self._maps)):
            mine = np.flatnonzero((shard >= group[0]) & (shard <= group[-1]))
            problems = self._read(group, first[mine], count[mine], out, place[mine])
            damaged |= {int(run[mine[part]]): text for part, text in problems.items()}
        return damaged

    def _read(
        self, numbers: np.ndarray, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray
    ) -> dict[int, str]:
        """The same for runs that each lie in one of the shards of these numbers, ascending."""
        shards = [self._shard(number) for number in numbers.tolist()]
        owners = np.repeat(np.arange(len(shards)), [len(shard.ends) for shard in shards])
        ends, begins, shift, state = (
            np.concatenate([getattr(shard, name) for shard in shards]) for name in ("ends", "starts", "shift", "state")
        )
        run, member = _parts(ends, starts, lengths)
        within = member - np.searchsorted(owners, owners[member])
        unchecked = state[member] == _UNCHECKED
        touched = set(zip(owners[member[unchecked]].tolist(), within[unchecked].tolist(), strict=True))
        if touched:  # nearly never: it takes a pool of threads
            self._check([(shards[owner], number) for owner, number in sorted(touched)])
        damaged: dict[int, str] = {}
        if self._problems:
            for part, (owner, number) in enumerate(zip(owners[member].tolist(), within.tolist(), strict=True)):
                if problem := self._problems.get((shards[owner].path, number)):
                    damaged[int(run[part])] = problem
            good = ~np.isin(run, list(damaged))
            run, member = run[good], member[good]

        first = np.maximum(starts[run], begins[member])
        count = np.minimum(starts[run] + lengths[run], ends[member]) - first
        columns = (owners[member], first + shift[member], count, places[run] + first - starts[run])
        for owner, b, n, p in zip(*(column.tolist() for column in columns), strict=True):
            out[p : p + n] = shards[owner].ids[b : b + n]
        return damaged

    def _check(self, members: Sequence[tuple[_Shard, int]]) -> None:
        """Looks at these members of shards, several at a time: a disk far away is slow to answer, and fast for many."""
        with ThreadPoolExecutor(CHECKERS) as pool:
            problems = pool.map(lambda member: self._member_problem(*member), members)
            for (shard, number), problem in zip(members, problems, strict=True):
                shard.state[number] = _BAD if problem else _GOOD
                if problem:
                    self._problems[shard.path, number] = problem

    def _member_problem(self, shard: _Shard, member: int) -> str | None:
        """What is wrong with one member, None if nothing is."""
        path, table = shard.path, shard.table
        offset, size, crc32 = (
            int(column[member]) for column in (table.tokens_offset, table.tokens_size, table.tokens_crc32)
        )
        fetch(shard.whole, offset - TAR_BLOCK, offset + size)
        header, ids = (
            shard.ids[start // self.dtype.itemsize : stop // self.dtype.itemsize]
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

    def _map(self, number: int) -> _Shard:
        """Maps a shard's whole file as ids."""
        path, table = self._open_shard(number), self._members(number)
        whole = map_file(path)
        sizes = table.tokens_size // self.dtype.itemsize
        ends = self._starts[number] + np.cumsum(sizes)
        starts = ends - sizes
        return _Shard(
            path=path,
            whole=whole,
            ids=np.frombuffer(whole, self.dtype, len(whole) // self.dtype.itemsize),
            table=table,
            starts=starts,
            ends=ends,
            shift=table.tokens_offset // self.dtype.itemsize - starts,
            state=self._states.setdefault(number, np.full(len(sizes), _UNCHECKED, np.int8)),
        )


def _parts(ends: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(run, stretch), int64 [parts]: which of the stretches that end at `ends` a run of tokens lies in.

    Nearly every run lies in one; a long one is taken apart.
    """
    first = np.searchsorted(ends, starts, side="right")
    extra = np.searchsorted(ends, starts + lengths - 1, side="right") - first
    run = np.arange(len(starts))
    if not extra.any():
        return run, first
    run = np.repeat(run, extra + 1)
    within = np.arange(len(run)) - np.searchsorted(run, run)
    return run, first[run] + within
