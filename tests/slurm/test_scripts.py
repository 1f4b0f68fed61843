"""launch/slurm in a real SLURM of two hosts: chain, failing phase, end of time, power cut."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from tests.runs import run_config
from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
SIZE = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"SLURM: {reason}")
    with tempfile.TemporaryDirectory(prefix="neomoba-slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def config_file(path: Path, steps: int) -> Path:
    config = run_config({}).to_dict()
    config["neomoba"]["phase"]["steps"] = steps
    config["neomoba"]["checkpoint"]["save_every"] = 10
    path.write_text(json.dumps(config))
    return path


def submit(cluster: Cluster, *words: str | Path, **environment: str) -> list[str]:
    """Job ids that the command prints."""
    result = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT, env=cluster.environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return [line.removeprefix("job ").split(":")[0] for line in result.stdout.splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / METRICS_FILE)]


def test_chain(cluster: Cluster, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.json", 4)
    jobs = submit(cluster, "launch/slurm/submit.sh", tmp_path / "run", *SIZE, f"--output={tmp_path}/%j.out",
                  CONFIGS=f"{config} {config}")  # fmt: skip
    assert cluster.finish(*jobs) == ["COMPLETED", "COMPLETED"]
    assert [len(losses(tmp_path / "run" / phase)) for phase in ("phase1", "phase2")] == [4, 4]
    assert "2 ranks on n[1-2]" in (tmp_path / f"{jobs[0]}.out").read_text()
    assert "phase1" in (tmp_path / "run" / "phase2" / "logs" / f"{jobs[1]}.0.0.log").read_text()


def test_a_failing_phase_ends_the_chain(cluster: Cluster, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"bad": 1}')
    jobs = submit(cluster, "launch/slurm/submit.sh", tmp_path / "run", *SIZE, f"--output={tmp_path}/%j.out",
                  CONFIGS=f"{bad} {config_file(tmp_path / 'tiny.json', 4)}", MAX_RETRIES="0")  # fmt: skip
    assert cluster.finish(*jobs) == ["FAILED", "CANCELLED"]
    assert "not started again after 0 restarts" in (tmp_path / f"{jobs[0]}.out").read_text()


@pytest.mark.parametrize("fault", ["time is up", pytest.param("power cut", marks=pytest.mark.full)])
def test_started_again_the_curve_is_that_of_a_run_never_stopped(cluster: Cluster, tmp_path: Path, fault: str) -> None:
    config = config_file(tmp_path / "tiny.json", 60)

    def start(name: str) -> str:
        return submit(cluster, "sbatch", "--parsable", *SIZE, f"--output={tmp_path}/{name}.out",
                      "launch/slurm/pretrain.sbatch", config, tmp_path / name)[0]  # fmt: skip

    stopped = start("stopped")
    cluster.wait(lambda: (tmp_path / "stopped" / "checkpoints" / "step_10").exists(), 60)
    if fault == "time is up":
        cluster.call("scancel", "--signal=USR1", "--batch", stopped)
    else:
        cluster.cut_power("n2")
        cluster.wait(lambda: cluster.state(stopped) != "RUNNING", 60)
        cluster.boot("n2")
    undisturbed = start("undisturbed")
    assert cluster.finish(stopped, undisturbed) == ["COMPLETED", "COMPLETED"]
    assert "start 2 of 4" in (tmp_path / "stopped.out").read_text()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    for file in sorted((tmp_path / "stopped" / "checkpoints" / "step_60").glob("*.safetensors")):
        other = tmp_path / "undisturbed" / "checkpoints" / "step_60" / file.name
        assert file.read_bytes() == other.read_bytes(), os.fspath(file)
