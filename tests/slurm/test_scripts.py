"""launch/slurm in a real SLURM of two hosts: chain, mistakes, STOP, end of time, lost hosts, arrays, MPI."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from tests.programs import run_program
from tests.runs import run_config, shared_corpus
from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)
SIZE = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"tests/slurm ({reason})")
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
    usual = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HEALTH_CHECK": "0"}
    result = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT, env=cluster.environment | usual | environment,
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return [line.removeprefix("job ").split(":")[0] for line in result.stdout.splitlines()]


def failing_python(folder: Path, where: str) -> Path:
    """An interpreter that ends at once in training where the words of bash's [[ ]] hold."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\n[[ {where} && $1 == launch/pretrain.py ]] && exit 9\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / METRICS_FILE)]


def test_chain(cluster: Cluster, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.json", 4)
    jobs = submit(cluster, "launch/slurm/submit.sh", tmp_path / "run", *SIZE, f"--output={tmp_path}/%j.out",
                  CONFIGS=f"{config} {config}", HEALTH_CHECK="1", HEALTH_TOLERANCE="1000")  # fmt: skip
    assert cluster.finish(*jobs) == ["COMPLETED", "COMPLETED"]
    assert [len(losses(tmp_path / "run" / phase)) for phase in ("phase1", "phase2")] == [4, 4]
    said = (tmp_path / f"{jobs[0]}.out").read_text()
    assert "2 ranks on n[1-2]" in said
    assert f"torch {torch.__version__}" in said
    for host in ("n1", "n2"):
        assert f"{host}: 1 of 2 ranks, slowest product " in said
    assert "phase1" in (tmp_path / "run" / "phase2" / "logs" / f"{jobs[1]}.0.0.log").read_text()


def test_a_failing_phase_ends_the_chain(cluster: Cluster, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"bad": 1}')
    jobs = submit(cluster, "launch/slurm/submit.sh", tmp_path / "run", *SIZE, f"--output={tmp_path}/%j.out",
                  CONFIGS=f"{bad} {config_file(tmp_path / 'tiny.json', 4)}")  # fmt: skip
    assert cluster.finish(*jobs) == ["FAILED", "CANCELLED"]
    said = (tmp_path / f"{jobs[0]}.out").read_text()
    assert "not started again, it would fail again: " in said
    assert "unknown key bad" in said
    assert "start 2" not in said


def test_stop_ends_the_run_and_the_chain(cluster: Cluster, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.json", 10_000)
    jobs = submit(cluster, "launch/slurm/submit.sh", tmp_path / "run", *SIZE, f"--output={tmp_path}/%j.out",
                  CONFIGS=f"{config} {config}")  # fmt: skip
    run = tmp_path / "run" / "phase1"
    cluster.wait(lambda: (run / METRICS_FILE).exists(), 200)
    (run / "STOP").touch()
    assert cluster.finish(*jobs) == ["FAILED", "CANCELLED"]
    assert (run / "INTERRUPTED").read_text() == f"step {losses(run)[-1][0]}: STOP\n"
    assert "starting again" not in (tmp_path / f"{jobs[0]}.out").read_text()


def test_a_host_that_fails_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """One rank on n1 cannot write its log: the second start is on n2."""
    python = failing_python(tmp_path, "$(hostname) == n1")
    config = config_file(tmp_path / "tiny.json", 4)
    job = submit(cluster, "sbatch", "--parsable", "--ntasks=1", "--ntasks-per-node=1", f"--output={tmp_path}/out",
                 "launch/slurm/pretrain.sbatch", config, tmp_path / "run",
                 PYTHON=os.fspath(python))  # fmt: skip
    assert cluster.finish(*job) == ["COMPLETED"]
    said = (tmp_path / "out").read_text()
    assert "srun ended with 9" in said
    assert "without n1; starting again" in said
    assert "1 ranks on n2" in said


def test_failures_are_bounded(cluster: Cluster, tmp_path: Path) -> None:
    python = failing_python(tmp_path, "1 == 1")
    config = config_file(tmp_path / "tiny.json", 4)
    job = submit(cluster, "sbatch", "--parsable", *SIZE, f"--output={tmp_path}/out", "launch/slurm/pretrain.sbatch",
                 config, tmp_path / "run", PYTHON=os.fspath(python), MAX_RETRIES="1")  # fmt: skip
    assert cluster.finish(*job) == ["FAILED"]
    said = (tmp_path / "out").read_text()
    assert said.count("start 2") == 1
    assert "not started again after 1 restarts without a new checkpoint" in said


def test_evaluation_of_checkpoints_and_tasks_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.json", 2)
    assert run_program("launch/pretrain.py", "--ds_config", config, "--output_dir", tmp_path / "run").returncode == 0
    jobs = submit(cluster, "sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/%a.out",
                  "launch/slurm/evaluate.sbatch", tmp_path / "scores", "position_loss", tmp_path / "run",
                  tmp_path / "run" / "checkpoints" / "step_2", "--", "--rows", "4")  # fmt: skip
    assert cluster.finish(*jobs) == ["COMPLETED\nCOMPLETED"]
    for name in ("run", "run-step_2"):
        assert list((tmp_path / "scores" / name / "position_loss").glob("*.json")), name


@pytest.mark.full
def test_a_grid_of_models_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """Four runs on three jobs, each on two ranks; the table then trains nothing."""
    config = config_file(tmp_path / "tiny.json", 2)
    arms = {"full": {"neomoba.model.attention": "full"}, "MoBA": {}}
    evaluation = ["--tasks", "position_loss", "--length", "256", "--rows", "2"]
    size = {"ds_config": str(config), "arms": arms, "seeds": [1, 2], "evaluate": evaluation}
    size["metrics"] = [{"label": "loss", "key": "position_loss.loss"}]
    grid, output = tmp_path / "grid.json", tmp_path / "runs"
    grid.write_text(json.dumps({"question": "Which?", "sizes": {"tiny": size}}))
    jobs = submit(cluster, "sbatch", "--parsable", "--array=1-3", f"--output={tmp_path}/%a.out",
                  "launch/slurm/ablation.sbatch", grid, output, "2")  # fmt: skip
    assert cluster.finish(*jobs) == ["COMPLETED\nCOMPLETED\nCOMPLETED"]
    runs = {file.parent: file.stat().st_mtime_ns for file in output.glob("*/*/metrics.jsonl")}
    assert sorted(f"{folder.parent.name} {folder.name}" for folder in runs) == ["MoBA 1", "MoBA 2", "full 1", "full 2"]
    table = run_program("-m", "evals", "ablation", grid, "--output", output, "--ranks", "2")
    assert "loss, difference to the first" in table.stdout, table.stderr
    assert {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in runs} == runs


def test_tokenizing_on_all_ranks(cluster: Cluster, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the {i} quick brown foxes jump over the {i + 1} lazy dogs" for i in range(200)))
    jobs = submit(cluster, "sbatch", "--parsable", *SIZE, f"--output={tmp_path}/out", "launch/slurm/tokenize.sbatch",
                  tmp_path / "corpus", "--input", text, "--tokenizer", shared_corpus())  # fmt: skip
    assert cluster.finish(*jobs) == ["COMPLETED"]
    assert "one process under" not in (tmp_path / "out").read_text()
    assert (tmp_path / "corpus" / "index.json").is_file()


def test_four_silent_processes_of_another_mpi_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks whose MPI does not find srun's would each do all the work."""
    jobs = submit(cluster, "sbatch", "--parsable", *SIZE, f"--output={tmp_path}/out", "launch/slurm/tokenize.sbatch",
                  tmp_path / "corpus", "--input", ROOT / "README.md", "--tokenizer", shared_corpus(),
                  MPI="none")  # fmt: skip
    assert cluster.finish(*jobs) == ["FAILED"]
    assert "2 processes were started, but mpi4py runs on MPICH" in (tmp_path / "out").read_text()
    assert not (tmp_path / "corpus" / "index.json").exists()


@pytest.mark.parametrize("fault", ["time is up", pytest.param("power cut", marks=pytest.mark.full)])
def test_started_again_the_curve_is_that_of_a_run_never_stopped(cluster: Cluster, tmp_path: Path, fault: str) -> None:
    config = config_file(tmp_path / "tiny.json", 60)

    def start(name: str) -> str:
        return submit(cluster, "sbatch", "--parsable", *SIZE, f"--output={tmp_path}/{name}.out",
                      "launch/slurm/pretrain.sbatch", config, tmp_path / name)[0]  # fmt: skip

    stopped = start("stopped")
    cluster.wait(lambda: (tmp_path / "stopped" / "checkpoints" / "step_10").exists(), 200)
    if fault == "time is up":
        cluster.call("scancel", "--signal=USR1", "--batch", stopped)
    else:
        cluster.cut_power("n2")
        cluster.wait(lambda: cluster.state(stopped) != "RUNNING", 60)
        cluster.boot("n2")
    undisturbed = start("undisturbed")
    assert cluster.finish(stopped, undisturbed) == ["COMPLETED", "COMPLETED"]
    assert ", start 2, " in (tmp_path / "stopped.out").read_text()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    for file in sorted((tmp_path / "stopped" / "checkpoints" / "step_60").glob("*.safetensors")):
        other = tmp_path / "undisturbed" / "checkpoints" / "step_60" / file.name
        assert file.read_bytes() == other.read_bytes(), os.fspath(file)
