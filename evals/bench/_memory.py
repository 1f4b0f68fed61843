"""Memory of this process as Linux counts it, and the most that a piece of work holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process; getrusage would count what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def forget_peak() -> None:
    """From now on VmHWM is the most since now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_above(work: Callable[[], None], device: str) -> int:
    """Most bytes that `work` holds at once above those held before. device: "cpu" or "cuda".

    On a CPU: resident memory, after the allocator has given back what is free, which would hide a part of the peak.
    """
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    held = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - held
