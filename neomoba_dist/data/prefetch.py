"""A thread that works ahead: the items of an iterator, some of them ready before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetch(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """Yields an iterator over `items` that keeps up to `depth` of them ready; 0 = no thread.

    What `items` raises is raised where its item would have come. Leaving the block ends the thread.
    """
    if depth == 0:
        yield items
        return
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room = threading.Semaphore(depth)
    leaving = threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not leaving.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # raised again by the reader of the items
            ready.put((None, error))

    def taken() -> Iterator[T]:
        while True:
            item, error = ready.get()
            room.release()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        leaving.set()
        room.release()
        thread.join()
