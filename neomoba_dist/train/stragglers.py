"""Which rank keeps the others waiting: the seconds of its own work, waiting left out.

In a step all ranks take equally long, because they wait for one another. What differs is how long a rank needs for its
batch and its forward passes; that is measured on every rank, and travels in the one collective of an update.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neomoba_dist.parallel.mesh import Mesh

EVERY = 100  # steps that one line speaks for


class ForwardTimer:
    """Seconds of a module's forward passes in training, without what our own collectives in them waited.

    On a GPU the device's own clock is read, and collectives in the forward pass (of tensor or context parallelism,
    ZeRO-3, experts) count: there the ranks that wait for one another look alike, and a slow one makes its group slow.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        self._seconds = self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def take(self) -> float:
        """Seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _start(self, module: nn.Module, *unused: Any) -> None:
        if not module.training:
            return
        if self.mesh.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._events.append((start, stop))
        else:
            self._began = time.perf_counter() - self._waited()

    def _stop(self, module: nn.Module, *unused: Any) -> None:
        if not module.training:
            return
        if self._events:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._waited() - self._began

    def _waited(self) -> float:
        return sum(entry.seconds for entry in self.mesh.ledger.entries.values())


class Stragglers:
    """Adds up the ranks' seconds, those of `EVERY` steps at a time."""

    def __init__(self, mesh: Mesh) -> None:
        self._rank, self._size = mesh.rank, mesh["world"].size
        self._clear()

    def _clear(self) -> None:
        self._steps, self._step_seconds = 0, 0.0
        self._own = [0.0] * self._size

    def part(self, seconds: float) -> list[float]:
        """This rank's seconds, in its place among those of all ranks."""
        part = [0.0] * self._size
        part[self._rank] = seconds
        return part

    def add(self, own: Sequence[float], step_seconds: float) -> None:
        """One step: of every rank its own work, and how long the step took."""
        self._own = [before + now for before, now in zip(self._own, own, strict=True)]
        self._step_seconds += step_seconds
        self._steps += 1

    def entry(self) -> dict[str, Any]:
        """For metrics.jsonl, means per step since the last call: rank_seconds of every rank's own work, the slowest
        rank, and which share of a step its own work takes."""
        own = [seconds / self._steps for seconds in self._own]
        slowest = max(range(self._size), key=own.__getitem__)
        share = self._own[slowest] / self._step_seconds
        self._clear()
        return {"rank_seconds": own, "slowest_rank": slowest, "slowest_rank_share": share}


def straggler_line(entry: dict[str, Any]) -> str:
    """The same in words."""
    own, slowest = entry["rank_seconds"], entry["slowest_rank"]
    return (
        f"own work of the ranks per step (data, forward): median {statistics.median(own):.3f} s, "
        f"slowest rank {slowest} {own[slowest]:.3f} s, {entry['slowest_rank_share']:.0%} of the step"
    )
