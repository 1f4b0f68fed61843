"""Where the time of a piece of work goes, kernel by kernel: of the GPU's own clock, on a CPU of torch's operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHOWN, NAME_WIDTH = 25, 70


def kernel_times(work: Callable[[], object], device: str) -> dict[str, Any]:
    """Run it once. Returns wall seconds, seconds that the device was busy, and of each kernel its seconds and launches,
    longest first. device: "cuda" or "cpu"."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    # kernels alone: recording operators too would slow the host, which may be what the device waits for
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    found = [
        {
            "name": entry.key,
            "seconds": (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) / 1e6,
            "launches": entry.count,
        }
        for entry in profiler.key_averages()
    ]
    found = sorted((kernel for kernel in found if kernel["seconds"] > 0), key=lambda kernel: -kernel["seconds"])
    busy = sum(kernel["seconds"] for kernel in found)
    return {"wall_seconds": seconds, "busy_seconds": busy, "kernels": found}


def profile_lines(found: dict[str, Any]) -> list[list[str]]:
    """The longest kernels as a table; the last line is all others together."""
    kernels, busy = found["kernels"], found["busy_seconds"]
    rest = kernels[SHOWN:]
    others = {"name": f"{len(rest)} others"} | {k: sum(x[k] for x in rest) for k in ("seconds", "launches")}
    lines = [[f"busy {1e3 * busy:.1f} of {1e3 * found['wall_seconds']:.1f} ms", "ms", "share", "launches"]]
    for kernel in [*kernels[:SHOWN], *([others] if rest else [])]:
        name, seconds = kernel["name"], kernel["seconds"]
        shown = name if len(name) <= NAME_WIDTH else f"{name[:NAME_WIDTH]}..."
        lines.append([shown, f"{1e3 * seconds:.2f}", f"{100 * seconds / busy:.1f} %", str(kernel["launches"])])
    return lines
