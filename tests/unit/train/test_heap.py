"""Freed memory stays with the process, so that a step's tensors cost no page faults the second time."""

import resource
import subprocess
import sys

from neomoba_dist.train.heap import keep_freed_memory

PAGES = 64 * 2**20 // resource.getpagesize()


def faults(times: int) -> int:
    """Page faults of allocating, filling and freeing 64 MiB so often."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        bytearray(PAGES * resource.getpagesize())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    without = faults(4)
    taken = keep_freed_memory()
    faults(1)
    print(without, taken, faults(4))


def test_the_same_memory_is_given_out_again() -> None:
    """In a process of its own: the setting is for good."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, timeout=60, check=True)
    without, taken, within = done.stdout.split()
    assert taken == "True"
    assert int(within) < 0.01 * PAGES < 4 * PAGES <= int(without)


if __name__ == "__main__":
    main()
