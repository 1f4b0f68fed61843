"""Seconds of one pass on a device, and the least of several for rivals that take turns.

On a CPU with one thread the clock is the CPU time of the process, which other users of the machine do not change; with
more threads it is wall time. On a GPU it is CUDA events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def least(works: Mapping[str, Callable[[], None]], *, device: str, threads: int, repetitions: int) -> dict[str, float]:
    """Seconds of the fastest repetition of each, after one to warm up; a slower spell of the machine meets all."""
    for work in works.values():
        work()
    measured = in_turns(works, device=device, threads=threads, repetitions=repetitions)
    return {name: min(found) for name, found in measured.items()}


def in_turns(
    works: Mapping[str, Callable[[], None]],
    *,
    device: str,
    threads: int,
    repetitions: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each. before: called with its name before each pass, and not timed."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            before(name)
            found[name].append(seconds(work, device, threads))
    return found


def seconds(work: Callable[[], None], device: str, threads: int) -> float:
    """Of one pass. device: "cpu" or "cuda". threads: of all processes that work on it."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def as_graph(work: Callable[[], None]) -> Callable[[], None]:
    """The same work on a GPU without its host time: captured once as a CUDA graph, and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # builds and chooses kernels, which a capture may not
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
