"""Every launcher really started: its ranks find number, world size, meeting place and each other by themselves."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from neomoba_dist.errors import MISTAKE
from tests.programs import ROOT
from tests.runs import run_config

BIN = Path(sys.executable).parent
CHECK = ("launch/check_hosts.py", "--size", "64", "--megabytes", "1", "--tolerance", "10000")
OPEN_MPI = "/usr/bin/mpirun --allow-run-as-root --oversubscribe -n 2"
MPICH = f"{BIN}/mpirun -n 2"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """No variable of any launcher comes from the tests' own environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI", "RANK", "MASTER_"))}
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT, env=clean | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    """All that it prints, once it has ended well."""
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def need_open_mpi() -> None:
    if not Path("/usr/bin/mpirun").exists():
        pytest.skip("Open MPI in tests/end_to_end/test_launchers.py (not installed)")


def both_met(output: str) -> bool:
    return f"{socket.gethostname()}: 2 of 2 ranks, " in output and "sound" in output


def test_deepspeed_on_one_host() -> None:
    assert both_met(said(start("deepspeed", "--num_gpus", "2", "--master_port", free_port(), *CHECK)))


def test_torchrun() -> None:
    assert both_met(said(start("torchrun", "--standalone", "--nproc-per-node", "2", *CHECK)))


def test_deepspeed_on_every_host_as_srun_starts_it(tmp_path: Path) -> None:
    """--no_ssh --node_rank: nothing logs in anywhere; two hosts of one name each for this machine."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = free_port()
    runners = [
        start("deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", rank, "--master_addr", "127.0.0.1",
              "--master_port", port, *CHECK,
              SLURM_PROCID=str(rank), SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID="0", SLURM_LOCALID="0",
              SLURM_JOB_NODELIST="localhost")
        for rank in range(2)
    ]  # fmt: skip
    outputs = [said(runner) for runner in runners]
    assert sum(both_met(output) for output in outputs) == 1


def test_srun() -> None:
    """What srun sets, without srun; tests/slurm starts the real one."""
    shared = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}
    job = str(int(free_port()) - 15000) if int(free_port()) > 15000 else "1"
    ranks = [
        start(sys.executable, *CHECK, **shared, SLURM_JOB_ID=job, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]
    assert both_met(said(ranks[0]))
    assert said(ranks[1]) == ""


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun(mpirun: str) -> None:
    if mpirun == OPEN_MPI:
        need_open_mpi()
    assert both_met(said(start(*mpirun.split(), sys.executable, *CHECK, MASTER_PORT=free_port())))


def test_ranks_that_would_each_work_alone_are_refused(tmp_path: Path) -> None:
    """What a rank sees of an mpirun that is not of mpi4py's MPI: its own world of one."""
    words = ("-m", "data_tools.tokenize_corpus", "--mpi", "--input", "README.md", "--tokenizer", tmp_path)
    process = start(
        *(sys.executable, *words, "--output", tmp_path / "corpus"), OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2"
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == MISTAKE
    assert output.splitlines()[-1].startswith("error: 2 processes were started, but mpi4py runs on MPICH Version: 5")
    assert not (tmp_path / "corpus").exists()


def test_another_number_of_ranks_than_asked_for_is_refused(tmp_path: Path) -> None:
    process = start(sys.executable, "launch/pretrain.py", "--ds_config", "ds_configs/cpu_tiny.json", "--output_dir",
                    tmp_path, "--world_size", "4")  # fmt: skip
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert output == "error: --world_size 4, but the launcher started 1 ranks; start as many as asked\n"
    assert (tmp_path / "REFUSED").read_text() == output.removeprefix("error: ")


@pytest.mark.full
@pytest.mark.parametrize("launcher", [OPEN_MPI, "torchrun --standalone --nproc-per-node 2"], ids=["mpirun", "torchrun"])
def test_training_under_other_launchers(tmp_path: Path, launcher: str) -> None:
    if launcher == OPEN_MPI:
        need_open_mpi()
    words = launcher.split()
    if not shutil.which(words[0], path=f"{BIN}:{os.environ['PATH']}"):
        raise AssertionError(words[0])
    python = [sys.executable] if launcher == OPEN_MPI else []
    config = tmp_path / "tp2.json"
    config.write_text(json.dumps(run_config({"tensor_model_parallel_size": 2}).to_dict()))
    said(start(*words, *python, "launch/pretrain.py", "--ds_config", config, "--output_dir", tmp_path / "run",
               "--max_steps", "2", MASTER_PORT=free_port()))  # fmt: skip
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "manifest.json").is_file()
