"""Start-up checks: every shard is looked at by one rank of the job, and again only if its size or time changed.

What was found whole is remembered in the cache by (size, time of last change); all ranks learn the outcome in one
exchange. Payloads are checked when they are read, or all at once by `data_tools.verify_shards`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from neomoba_dist.data.corpus import Corpus, read_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import INDEX_FILE, table_problem
from neomoba_dist.data.job import Job
from neomoba_dist.data.shards import REMAKE, extra_problems, shard_problem
from neomoba_dist.data.stored import map_arrays, write_shared

_NOT_SEEN = (-1, -1)

Stamp = tuple[int, int]  # size in bytes, time of last change in nanoseconds


def open_corpus(location: str | Path, key: str = "neomoba.data.train", cache: Path | None = None) -> Corpus:
    """`read_corpus`, and this process alone checks all shards: `check_corpora`. DataError, in one line."""
    corpus = read_corpus(location, key, cache)
    check_corpora([corpus], cache)
    return corpus


def check_corpora(corpora: Sequence[Corpus], cache: Path | None = None, job: Job | None = None) -> None:
    """Checks that tables and shards are there and are those that the index means; all ranks of the job call it.

    AgreedError, in one line, if one is missing, cut, swapped or extra, or if the tables do not fit the index. `cache`
    is where whole files are remembered; None looks at all of them.
    """
    job = job or Job()
    problem, seen = None, []
    for corpus in corpora:
        stamps: dict[int, Stamp] = {}
        try:
            for number, stamp in _look(corpus, _remembered(corpus, cache), job):
                stamps[number] = stamp
        except (DataError, OSError) as error:
            problem = problem or str(error)
        seen.append(stamps)
    told = job.agree(problem, seen)
    if cache is not None and job.rank == 0:
        for number, corpus in enumerate(corpora):
            _remember(corpus, cache, {key: stamp for stamps in told for key, stamp in stamps[number].items()})


def _look(corpus: Corpus, remembered: np.ndarray, job: Job) -> Iterator[tuple[int, Stamp]]:
    """(number, stamp) of this rank's files: the tables, then the shards. DataError at the first that is damaged."""
    index = corpus.index
    tables = index.tables
    if corpus.remote is None and job.rank == 0:
        for problem in extra_problems(corpus.folder, index.shards):
            raise DataError(problem)
    documents = np.cumsum([0, *(shard.documents for shard in index.shards)])
    for number in range(job.rank, len(tables) + len(index.shards), job.size):
        place = number - len(tables)  # among the shards
        if place < 0:
            name, sha256 = tables[number]
            path = corpus.open_file(name, sha256)
            stamp = _stamp(path)
            found = None if _known(stamp, remembered[number]) else table_problem(path, sha256)
        elif corpus.remote:
            stamp, found = _NOT_SEEN, corpus.remote.problem(index.shards[place])
        else:
            shard = index.shards[place]
            path = corpus.folder / shard.file
            stamp = _stamp(path)
            found = None
            if not _known(stamp, remembered[number]):
                found = shard_problem(path, shard.bytes) or _content_problem(corpus, place, int(documents[place]))
        if found:
            raise DataError(found)
        yield number, stamp


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return _NOT_SEEN
    return found.st_size, found.st_mtime_ns


def _known(stamp: Stamp, remembered: np.ndarray) -> bool:
    return stamp != _NOT_SEEN and stamp == tuple(remembered.tolist())


def _content_problem(corpus: Corpus, number: int, first_document: int) -> str | None:
    """Whether the tables fit what the index says of a shard, and the shard is the one that they mean.

    Its first few bytes, which no other shard has there, tell.
    """
    shard = corpus.index.shards[number]
    table = corpus.members(number)
    stored = int(table.tokens_size.sum()) // np.dtype(corpus.index.dtype).itemsize
    lengths = corpus.lengths(first_document, first_document + shard.documents)
    if (int(lengths.sum()), stored) != (shard.tokens, shard.tokens):
        return (
            f"{corpus.name}: {INDEX_FILE} counts {shard.tokens} tokens in {shard.file}, its tables "
            f"{int(lengths.sum())} in members of {stored}; the corpus is damaged"
        )
    if not len(table.shard):
        return None
    offset, size = int(table.lengths_offset[0]), int(table.lengths_size[0])
    path = corpus.folder / shard.file
    with open(path, "rb") as file:
        payload = os.pread(file.fileno(), size, offset)
    if zlib.crc32(payload) != int(table.lengths_crc32[0]):
        return f"{path}: lengths at byte offset {offset} ({size} bytes) fail their crc32; {REMAKE}"
    return None


def _record(corpus: Corpus, cache: Path) -> Path:
    facts = json.dumps([str(Path(corpus.name).resolve()), corpus.fingerprint])
    return cache / "checked" / hashlib.sha256(facts.encode("utf-8")).hexdigest()[:32]


def _remembered(corpus: Corpus, cache: Path | None) -> np.ndarray:
    """Stamps of the files that were found whole, int64 [tables + shards, 2]; -1 for others."""
    files = len(corpus.index.tables) + len(corpus.index.shards)
    if cache is not None:
        try:
            (stamps,) = map_arrays(_record(corpus, cache))
            if len(stamps) == 2 * files:
                return stamps.reshape(files, 2)
        except (OSError, ValueError):  # none, or damaged: everything is looked at
            pass
    return np.full((files, 2), _NOT_SEEN, np.int64)


def _remember(corpus: Corpus, cache: Path, stamps: dict[int, Stamp]) -> None:
    known = np.array(_remembered(corpus, cache))
    fresh = known.copy()
    fresh[list(stamps)] = list(stamps.values())
    if not np.array_equal(known, fresh):
        write_shared(_record(corpus, cache), [fresh.reshape(-1)])
