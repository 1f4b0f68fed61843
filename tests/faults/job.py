"""Two ranks of launch/pretrain.py as forked processes, and what they leave behind."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from tests.programs import ROOT, start_program


class Job:
    """Two ranks of launch/pretrain.py in one run folder.

    `other`: the configuration of rank 1, if it has its own; `more`: words of the command line.
    """

    def __init__(self, config: Path, output: Path, other: Path | None = None, more: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.output, self.began = output, 0.0
        self.errors = [output.with_name(f"{output.name}.{rank}.{port}.err") for rank in range(2)]
        words = ["launch/pretrain.py", *more, "--output_dir", str(output), "--ds_config"]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        self.ranks = [
            start_program(
                [*words, str((config, other or config)[rank])],
                ROOT,
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                error.with_suffix(".out"),
                error,
            )
            for rank, error in enumerate(self.errors)
        ]

    def signal(self, rank: int, number: signal.Signals, after: int) -> None:
        """Once step `after` is in the log."""
        deadline = time.monotonic() + 60
        while not (self.output / METRICS_FILE).is_file() or steps(self.output)[-1:] < [after]:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        self.began = time.monotonic()
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, limit: float, what: str = "") -> list[int | None]:
        """Exit codes, all within `limit` seconds."""
        deadline = time.monotonic() + limit
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        if what:
            print(f"{what}: all ended after {time.monotonic() - self.began:.1f} s")
        found = [process.exitcode for process in self.ranks]
        assert None not in found, self.said()
        return found

    def errors_said(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.errors if path.is_file())

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run / METRICS_FILE)]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm), bit by bit."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run / METRICS_FILE)]


def weights(run: Path) -> dict[str, bytes]:
    """The files of the last checkpoint."""
    folder = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
