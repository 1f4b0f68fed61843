"""Settings for the whole suite: one thread per process, DeepSpeed on the CPU, a bounded time per test."""

import gc
import os
import threading
from collections.abc import Generator
from contextlib import suppress

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# tqdm's own lock is one for all forked processes, and a rank that a test kills while it holds it would hang all later
# ones; the tests of kernels run where there is no tqdm
with suppress(ImportError):
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


# files of few tests that take minutes: last in line, they would leave one of two workers idle
LONG = ("test_readme.py", "test_moba_triton.py", "test_moe_triton.py", "test_ablation.py", "slurm/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, otherwise in the given order."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_collection_finish() -> None:
    """What is imported by now stays: garbage collections, of which DeepSpeed orders some in every rank, need not walk
    through it, nor forked processes copy its pages for that."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """The interpreter's end wants its objects back."""
    gc.unfreeze()


# what `map_launcher_environment` sets in a program that a test calls in its own process
MAPPED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """No test leaves launcher variables behind: the programs that later ones start would believe them."""
    before = {name: os.environ[name] for name in MAPPED if name in os.environ}
    result = yield
    for name in MAPPED:
        os.environ.pop(name, None)
    os.environ.update(before)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this machine lacks for some tests: a skipped test alone is easily overlooked."""
    found = {
        str(report.longrepr).split("Skipped: ")[-1].rstrip("')") for report in terminalreporter.stats.get("skipped", [])
    }
    for reason in sorted(found):
        terminalreporter.write_line(f"NOT RUN: {reason}; see docs/slurm.md", yellow=True)
