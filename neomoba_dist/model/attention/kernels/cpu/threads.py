"""Run independent pieces of CPU work side by side without thread thrashing.

A sparse attention is thousands of small matrix products. Spread over OpenMP threads each, they spend their time waiting
for one another (measured: 0.2 of the speed of full attention at 4k tokens), so whole heads run side by side instead,
each on one Python thread whose OpenMP is limited to itself; torch's operators release the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small operators between the pieces: after each parallel one, OpenMP's threads spin for milliseconds on the cores
    that the pieces need (measured: 0.8 of the speed of full attention at 2k tokens on 2 cores)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_side_by_side(tasks: Sequence[Callable[[], Result]], *, alone: bool = False) -> list[Result]:
    """Results of the tasks in their order; as many at a time as torch may use threads. No task may need autograd.

    alone: one after the other, for tasks too small to be worth a thread.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()  # a thread's own setting: tensors made here may be inference tensors

    def call(task: Callable[[], Result]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return task()

    if alone or threads == 1 or len(tasks) <= 1:
        with one_thread():
            return [call(task) for task in tasks]
    try:
        with ThreadPoolExecutor(min(threads, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(call, tasks))
    finally:
        torch.set_num_threads(threads)  # the workers' 1 is also what torch hands to threads that start later
