"""The ranks of a job as threads, for what the data side does together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from neomoba_dist.data.job import Job


def run_job(size: int, function: Callable[[Job], Any], timeout: float = 60.0) -> list[Any]:
    """`function(job)` in every rank, a thread named by its number; returns the results, or what was raised instead."""
    barrier, told = threading.Barrier(size, timeout=timeout), [None] * size
    found: list[Any] = [None] * size

    def gather(rank: int, value: Any) -> list[Any]:
        told[rank] = value
        barrier.wait()
        everything = list(told)
        barrier.wait()
        return everything

    def work(rank: int) -> None:
        try:
            found[rank] = function(Job(rank, size, lambda value: gather(rank, value)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads)
    return found
