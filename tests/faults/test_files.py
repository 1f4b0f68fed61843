"""Files that are damaged, missing or locked: one clear line, a non-zero exit on all ranks, no hang."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from launch.pretrain import REFUSED
from neomoba_dist.errors import MISTAKE
from neomoba_dist.train.metrics import METRICS_FILE, RunLog, RunLogError
from tests.faults.job import Job, steps
from tests.programs import ROOT, run_program
from tests.runs import run_config, shared_corpus


def config_on(corpus: Path, path: Path, **phase: Any) -> Path:
    tree: dict[str, Any] = run_config({}, **phase).to_dict()
    tree["neomoba"]["data"] |= {"train": str(corpus), "validation": None}
    path.write_text(json.dumps(tree))
    return path


def run_two(config: Path, output: Path) -> Job:
    job = Job(config, output)
    try:
        job.codes(60)
    finally:
        job.end()
    return job


def test_a_cut_shard_is_found_at_the_start(tmp_path: Path) -> None:
    corpus = shutil.copytree(shared_corpus(), tmp_path / "corpus")
    shard = sorted(corpus.glob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-2048])
    job = run_two(config_on(corpus, tmp_path / "config.json"), tmp_path / "run")
    assert [process.exitcode for process in job.ranks] == [MISTAKE, MISTAKE], job.said()
    assert len(job.errors_said()) == 1, job.said()
    assert shard.name in job.errors_said()[0]
    assert "Traceback" not in job.said()


def test_a_flipped_bit_in_a_row_ends_the_run_with_its_place(tmp_path: Path) -> None:
    corpus = shutil.copytree(shared_corpus(), tmp_path / "corpus")
    for shard in corpus.glob("*.tar"):
        payload = bytearray(shard.read_bytes())
        payload[5000] ^= 1
        shard.write_bytes(payload)
    job = run_two(config_on(corpus, tmp_path / "config.json", steps=60), tmp_path / "run")
    assert [process.exitcode for process in job.ranks] == [1, 1], job.said()
    assert any(".tar" in line and "offset" in line for line in job.errors_said()), job.said()
    assert "Traceback" not in job.said()


def test_a_stale_compile_lock_stops_nobody(tmp_path: Path) -> None:
    """What a killed build of DeepSpeed's operator leaves: later runs would wait for it in silence, for ever."""
    python = f"py{sysconfig.get_python_version().replace('.', '')}_cpu"
    lock = tmp_path / "extensions" / python / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = config_on(shared_corpus(), tmp_path / "config.json")
    result = run_program(
        *("launch/pretrain.py", "--ds_config", config, "--output_dir", tmp_path / "run", "--max_steps", "1"),
        timeout=60,
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )
    assert result.returncode == 0, result.stderr
    assert steps(tmp_path / "run") == [1]


def test_a_full_disk_under_the_log_is_one_line(tmp_path: Path) -> None:
    config = run_config({})
    log = RunLog(tmp_path, config, 0, 6)
    log._file.close()
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - the log closes it
    with pytest.raises(RunLogError) as caught:
        log.step({"step": 1})
    log.close()
    assert str(caught.value) == (
        f"{tmp_path / METRICS_FILE}: cannot be written (No space left on device); free space there and start again"
    )


WRONG_ON_RANK_1 = """
import os, runpy, sys
sys.argv[1:3] = ["--ds_config", sys.argv[1 + int(os.environ["RANK"])]]
sys.path.insert(0, "launch")
sys.argv[0] = "launch/pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
def test_a_mistake_on_one_rank_ends_all_of_a_launcher(tmp_path: Path) -> None:
    """The others would wait half an hour for it to join."""
    good, bad, program = (
        config_on(shared_corpus(), tmp_path / "good.json"),
        tmp_path / "bad.json",
        tmp_path / "start.py",
    )
    bad.write_text('{"bad": 1}')
    program.write_text(WRONG_ON_RANK_1)
    torchrun = Path(sys.executable).with_name("torchrun")
    result = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", program, good, bad, "--output_dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "REFUSED" in {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / REFUSED).read_text().startswith(f"{bad}: unknown key bad")
