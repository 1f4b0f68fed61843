"""Ranks killed, frozen or asked to stop: who ends, after how long, what is said, and that nothing is lost.

The ranks are forked processes that run launch/pretrain.py as a launcher would start them. The seconds that each fault
took are printed with `pytest -s`; docs/reliability.md has them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from neomoba_dist.errors import INTERRUPTED
from neomoba_dist.train.metrics import METRICS_FILE
from neomoba_dist.train.trainer import INTERRUPTED_FILE
from tests.faults.job import Job, curve, steps, weights
from tests.programs import ROOT
from tests.runs import run_config

STEPS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree: dict[str, Any] = run_config({}, steps=STEPS, checkpoint={"save_every": 10}).to_dict()
    tree["neomoba"]["log"]["validate_every"] = STEPS
    tree["neomoba"]["health"] = {"lost_after": 5.0}
    path = tmp_path_factory.mktemp("faults") / "tiny.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    job = Job(config, config.parent / "undisturbed")
    try:
        assert job.codes(120) == [0, 0], job.said()
    finally:
        job.end()
    return job.output


@pytest.fixture
def jobs(config: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts jobs in one run folder, and ends what is left of them."""
    started: list[Job] = []

    def start() -> Job:
        started.append(Job(config, tmp_path / "run"))
        return started[-1]

    yield start
    for job in started:
        job.end()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_is_named_and_the_run_goes_on_as_if_nothing_had_been(
    jobs: Any, undisturbed: Path, victim: int
) -> None:
    job = jobs()
    job.signal(victim, signal.SIGKILL, after=15)
    codes = job.codes(30, f"kill -9 of rank {victim}")
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, job.said()
    pid = job.ranks[victim].pid
    assert f"rank {victim} (" in job.said()
    assert f"process {pid})" in job.said()
    again = jobs()
    assert again.codes(120) == [0, 0], again.said()
    assert curve(again.output) == curve(undisturbed)
    assert weights(again.output) == weights(undisturbed)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_all_after_the_step_with_nothing_lost(
    jobs: Any, undisturbed: Path, number: signal.Signals
) -> None:
    job = jobs()
    job.signal(1, number, after=15)
    assert job.codes(30, f"{number.name} to rank 1") == [INTERRUPTED, INTERRUPTED], job.said()
    last = steps(job.output)[-1]
    assert last < STEPS
    assert (job.output / "checkpoints" / f"step_{last}" / "index.json").is_file()
    assert f"step {last}: " in (job.output / INTERRUPTED_FILE).read_text()
    again = jobs()
    assert again.codes(120) == [0, 0], again.said()
    assert steps(again.output) == list(range(1, STEPS + 1))  # none was computed twice
    assert curve(again.output) == curve(undisturbed)
    assert weights(again.output) == weights(undisturbed)
    assert not (again.output / INTERRUPTED_FILE).exists()


@pytest.mark.timeout(120)
def test_frozen_rank_is_named_with_the_collective_that_waits_for_it(jobs: Any) -> None:
    job = jobs()
    job.signal(1, signal.SIGSTOP, after=5)
    codes = job.codes(30, "SIGSTOP of rank 1, lost_after 5 s")
    assert codes == [1, -signal.SIGKILL], job.said()
    said = [line for line in job.said().splitlines() if line.startswith("error: ")]
    assert len(said) == 1, job.said()
    assert "no sign of life from rank 1 (" in said[0]
    assert "in step " in said[0]
    assert "rank 0 in all_" in said[0]
    stacks = (job.output / "stacks" / "rank-00000.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert "trainer.py" in stacks


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", ["deepspeed --num_gpus 2", "torchrun --standalone --nproc-per-node 2"])
def test_sigterm_to_the_launcher_saves_and_leaves_no_orphan(config: Path, tmp_path: Path, launcher: str) -> None:
    program, *options = launcher.split()
    found = shutil.which(program, path=str(Path(sys.executable).parent))
    assert found
    output = tmp_path / "run"
    tree = json.loads(config.read_text())
    tree["neomoba"]["phase"]["steps"] = 100_000
    (tmp_path / "long.json").write_text(json.dumps(tree))
    words = [found, *options, "launch/pretrain.py", "--ds_config", tmp_path / "long.json", "--output_dir", output]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (output / METRICS_FILE).is_file() or len(steps(output)) < 5:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.terminate()
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    print(f"SIGTERM to {program}: all ended after {time.monotonic() - began:.1f} s")
    last = steps(output)[-1]
    assert (output / INTERRUPTED_FILE).read_text().startswith(f"step {last}: ")
    assert (output / "checkpoints" / f"step_{last}" / "index.json").is_file()
