"""Settings for the whole suite: one thread per process, DeepSpeed on the CPU, a bounded time per test."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that no SLURM could be started: a skipped test alone is easily overlooked."""
    for report in terminalreporter.stats.get("skipped", []):
        if "SLURM: " in (text := str(report.longrepr)):
            reason = text.split("SLURM: ")[1].rstrip("')")
            terminalreporter.write_line(f"NOT RUN: tests/slurm ({reason}); see docs/slurm.md", yellow=True)
            return
