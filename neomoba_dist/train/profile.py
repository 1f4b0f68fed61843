"""--profile: a torch trace of a few steps and a memory snapshot, written beside the metrics."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP, ACTIVE = 1, 1, 2  # steps: the first one compiles and allocates


def step_profiler(output: Path | None, rank: int) -> AbstractContextManager[Any]:
    """A profiler whose `.step()` is called after every training step; without `output` one that does nothing.

    Writes profile/rank0.trace.json (open in Perfetto or chrome://tracing), profile/rank0.memory.txt (operators by
    memory) and on a GPU profile/rank0.memory.pickle (open on pytorch.org/memory_viz).
    """
    if output is None:
        return nullcontext()
    folder = output / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / f"rank{rank}.trace.json"))
        by_memory = "self_cuda_memory_usage" if cuda else "self_cpu_memory_usage"
        table = profiler.key_averages().table(sort_by=by_memory, row_limit=40)
        (folder / f"rank{rank}.memory.txt").write_text(table + "\n", encoding="utf-8")
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank{rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    return profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
        schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    )
