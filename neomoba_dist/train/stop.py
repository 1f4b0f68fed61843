"""Requests to stop from outside: signals, and a launcher that has died. They set a flag; a step is always finished."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}


class StopRequests:
    """Within it, SIGTERM, SIGUSR1 and the first SIGINT only set `reason`; for the main thread.

    A process that dies takes its signal with it: DeepSpeed's runner, ended by SIGTERM, leaves launch.py and its ranks
    training. So the chain of launchers above this process is watched as well.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._chain = launchers(psutil.Process().parents())
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        if self.reason is None and self._launcher_is_gone():
            self.reason = "the launcher is gone"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means now

    def _launcher_is_gone(self) -> bool:
        """A process whose parent has died belongs to another one."""
        try:
            children = [os.getppid(), *(process.ppid() for process in self._chain[:-1])]
        except psutil.NoSuchProcess:
            return True
        return children[: len(self._chain)] != [process.pid for process in self._chain]


def launchers(parents: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The first of `parents`, nearest first, that are programs of deepspeed or torchrun."""
    found = []
    for process in parents:
        try:
            words = process.cmdline()[:5]
        except psutil.Error:
            break
        if not LAUNCHERS.intersection(Path(word).name for word in words):
            break
        found.append(process)
    return found
