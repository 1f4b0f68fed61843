"""Ranks killed at random moments, some in the middle of a save; what is left equals the run without.

The seconds to detect and to be training again are printed with `pytest -s`; docs/reliability.md has them.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from neomoba_dist.train.metrics import METRICS_FILE
from tests.faults.job import Job, curve, steps, weights
from tests.programs import ROOT
from tests.runs import run_config

MOMENTS = ("training", "saving", "starting")


class Forked:
    """Two ranks as forked processes: quick to start."""

    def __init__(self, config: Path, output: Path) -> None:
        self._job, self.began = Job(config, output), time.monotonic()

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self._job.ranks]

    def said(self) -> str:
        return self._job.said()

    def ended(self) -> bool:
        return any(process.exitcode is not None for process in self._job.ranks)

    def codes(self, limit: float) -> list[int | None]:
        return self._job.codes(limit)

    def end(self) -> None:
        self._job.end()


class Launched:
    """Two ranks of a real launcher."""

    def __init__(self, config: Path, output: Path) -> None:
        self._log, self.began, folder = output.with_suffix(".log"), time.monotonic(), Path(sys.executable).parent
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = [folder / "deepspeed", "--num_gpus", "2", "--master_port", port, "launch/pretrain.py"]
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*words, "--ds_config", config, "--output_dir", output],
                cwd=ROOT, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """None while they are being started."""
        found = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "RANK" in child.environ() and "launch/pretrain.py" in child.cmdline():
                    found.append(child)
        return found if len(found) == 2 else []

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def ended(self) -> bool:
        return self._process.poll() is not None

    def codes(self, limit: float) -> list[int | None]:
        return [self._process.wait(limit)]

    def end(self) -> None:
        if not self.ended():
            for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
                process.kill()
            self._process.wait()


def last_step(output: Path) -> int:
    return max(steps(output), default=0) if (output / METRICS_FILE).is_file() else 0


def kill_one(run: Forked | Launched, output: Path, chance: random.Random, moment: str, most: int) -> None:
    """SIGKILL to one rank; `most`: steps after the first one. All others end by themselves."""

    def wait(ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            assert not run.ended(), run.said()
            assert time.monotonic() < deadline, run.said()
            time.sleep(0.002)

    def saving() -> bool:
        """A folder that has no name yet, and is not left by the run before."""
        found = [path for path in (output / "checkpoints").glob("*") if not path.name.removeprefix("step_").isdigit()]
        return any(path.stat().st_mtime > started for path in found)

    started = time.time()
    wait(run.ranks)
    ranks, before = run.ranks(), last_step(output)
    if moment == "starting":  # or already training, where starting takes less: it must not end first
        latest = time.monotonic() + chance.uniform(0.0, 4.0)
        wait(lambda: time.monotonic() >= latest or last_step(output) != before)
    else:
        wait(lambda: last_step(output) != before)
        print(f"training {time.monotonic() - run.began:.1f} s after the start")
        goal = last_step(output) + chance.randrange(most)
        wait(lambda: last_step(output) >= goal)
        if moment == "saving":
            wait(saving)
    chance.choice(ranks).kill()
    killed = time.monotonic()
    if moment == "starting" and isinstance(run, Forked):
        run.end()  # who is lost before the ranks have met is missed by the launcher alone, which ends the others
    assert any(run.codes(40)), run.said()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    print(f"{moment}: killed after step {last_step(output)}, all ended {time.monotonic() - killed:.1f} s later")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("start", "total", "kills"),
    [
        pytest.param(Forked, 60, 3, id="3 kills"),
        pytest.param(Forked, 200, 20, id="20 kills", marks=pytest.mark.full),
        pytest.param(Launched, 60, 3, id="3 kills under deepspeed", marks=pytest.mark.full),
    ],
)
def test_killed_at_random_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, start: type[Forked | Launched], total: int, kills: int
) -> None:
    tree: dict[str, Any] = run_config({}, steps=total, checkpoint={"save_every": 5, "keep_last": 3}).to_dict()
    tree["neomoba"]["log"]["validate_every"] = total
    config, chance, output = tmp_path / "tiny.json", random.Random(kills), tmp_path / "run"
    config.write_text(json.dumps(tree))
    for kill in range(kills):
        run = start(config, output)
        try:
            kill_one(run, output, chance, MOMENTS[kill % len(MOMENTS)], total // (kills + 1))
        finally:
            run.end()
    for run, limit in ((start(config, output), 180), (Forked(config, tmp_path / "undisturbed"), 120)):
        try:
            assert not any(run.codes(limit)), run.said()
        finally:
            run.end()
    assert curve(output) == curve(tmp_path / "undisturbed")
    assert [line[0] for line in curve(output)] == list(range(1, total + 1))
    assert weights(output) == weights(tmp_path / "undisturbed")
