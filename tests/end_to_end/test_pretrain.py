"""launch/pretrain.py as its users start it: real launchers, real bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from neomoba_dist.config import load_config
from neomoba_dist.errors import MISTAKE
from tests.programs import run_program
from tests.runs import metrics, run_config

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = "launch/pretrain.py"
TINY = ROOT / "ds_configs" / "cpu_tiny.json"


def start(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def pretrain(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_program(PRETRAIN, *words, timeout=240, **environment)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tiny model on the tests' corpus, as a JSON file."""
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(run_config({}).to_dict()))
    return path


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--ds_config", "nowhere.json"], {}, "nowhere.json"),
        (["--ds_config", TINY, "--set", "neomoba.model.hiden_size=64"], {}, "neomoba.model.hidden_size"),
        (["--ds_config", TINY, "--set", "zero_optimization.stage=0"], {}, "zero_optimization.stage"),
        (["--ds_config", TINY, "--set", "neomoba.data.train=empty"], {}, "make it with: "),
        (
            ["--ds_config", TINY, "--set", "neomoba.parallel.tensor_model_parallel_size=2"],
            {"RANK": "0", "WORLD_SIZE": "3"},
            "tensor_model_parallel_size",
        ),
        (["--ds_config", TINY], {"RANK": "0", "WORLD_SIZE": "5"}, "neomoba.phase.tokens_per_update"),
        (
            [
                *("--ds_config", TINY, "--set", "neomoba.phase.sequence_length=257"),
                *("neomoba.phase.tokens_per_update=2056", "neomoba.parallel.tensor_model_parallel_size=2"),
                "neomoba.parallel.sequence_parallel=true",
            ],
            {"RANK": "0", "WORLD_SIZE": "2"},
            "neomoba.phase.sequence_length",
        ),
    ],
    ids=["no file", "unknown key", "stage 0", "no corpus", "ranks", "batch", "length"],
)
def test_bad_input_is_one_line(words: list[str | Path], environment: dict[str, str], message: str) -> None:
    result = pretrain(*words, **environment)
    assert result.returncode == MISTAKE
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "must"], "no checkpoint to resume from"),
        (["--resume", "nowhere"], "nowhere: no checkpoint here"),
        (["--init_from", "nowhere"], "nowhere: no checkpoint here"),
        (["--set", "neomoba.model.vocab_size=1000"], "set neomoba.model.vocab_size=1200"),
        (["--set", "neomoba.phase.tokens_per_update=4194304"], "lower neomoba.phase.tokens_per_update"),
        (["--set", "fp16.enabled=true"], "fp16"),
        (["--set", "neomoba.model.intermediate_size=1000000000"], "error: out of memory on rank 0 ("),
        (["--max_steps", "0"], "--max_steps is 0; give at least 1"),
    ],
)
def test_bad_start_is_one_line(config_file: Path, tmp_path: Path, words: list[str], message: str) -> None:
    result = pretrain("--ds_config", config_file, "--output_dir", tmp_path / "run", *words)
    assert result.returncode == MISTAKE
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "nothing may be written before the checks"


@pytest.mark.parametrize("place", ["file", "file/below", "run/checkpoints as a file", "link to nothing"])
def test_an_output_folder_that_cannot_be_made_is_one_line(config_file: Path, tmp_path: Path, place: str) -> None:
    """Before the ranks meet: this one would wait for a second."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    output = tmp_path / place
    if place.startswith("run"):
        output = tmp_path / "run"
        output.mkdir()
        (output / "checkpoints").write_text("mine", encoding="utf-8")
    elif place.startswith("link"):
        output = tmp_path / "link"
        output.symlink_to(tmp_path / "nowhere")
    result = pretrain("--ds_config", config_file, "--output_dir", output, RANK="0", WORLD_SIZE="2")
    assert result.returncode == MISTAKE
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert result.stderr.startswith(f"error: --output_dir {output}: ")
    assert "is not a folder; give a folder of your own that can be written" in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_half_set_launcher_is_one_line(config_file: Path, tmp_path: Path) -> None:
    environment = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
    result = pretrain("--ds_config", config_file, "--output_dir", tmp_path / "run", **environment)
    assert result.returncode == MISTAKE
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert result.stderr.startswith(
        "error: SLURM_PROCID is set in the environment, but not SLURM_LOCALID, SLURM_STEP_ID, SLURM_JOB_NODELIST: "
    )


def test_a_finished_run_has_nothing_to_do(config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ("--ds_config", config_file, "--output_dir", output)
    first = pretrain(*command, "--max_steps", "1")
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for words, said in (
        (["--max_steps", "1"], "at step 1 of 1, nothing to do; raise --max_steps to go on"),
        (["--set", "neomoba.phase.steps=1", "neomoba.phase.warmup_steps=0"],
         "at step 1 of 1, nothing to do; raise neomoba.phase.steps to go on"),
    ):  # fmt: skip
        again = pretrain(*command, *words)
        assert (again.returncode, again.stderr) == (0, ""), again.stderr
        assert again.stdout == f"{output}: {said}\n"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    (file,) = output.glob("checkpoints/step_1/weights-*")
    file.write_bytes(file.read_bytes()[:-1] + b"?")  # it would be found only if somebody loaded it
    damaged = pretrain(*command, "--max_steps", "1")
    assert damaged.returncode != 0
    assert f"{file}: its checksum is wrong" in damaged.stdout
    assert "none of its 1 checkpoints is whole" in damaged.stderr


def test_a_port_in_use_is_one_line(config_file: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = pretrain(
            *("--ds_config", config_file, "--output_dir", tmp_path / "run"),
            RANK="0",
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert "Traceback" not in result.stderr


def test_dry_run() -> None:
    result = pretrain(
        "--ds-config", "ds_configs/phase3.json", "--dry-run", "--world-size", "8", "--set", "zero_optimization.stage=1"
    )
    assert result.returncode == 0, result.stderr
    resolved, _, rest = result.stdout.partition("\nworld 8 = ")
    assert json.loads(resolved)["zero_optimization"]["stage"] == 1
    assert rest.startswith("tp 1 x cp 1 x dp 8 x pp 1")
    assert "accumulation 8 x dp 8" in rest


def test_deepspeed_launcher_trains_resumes_and_starts_the_next_phase(config_file: Path, tmp_path: Path) -> None:
    """tp 2 on two ranks: three steps, three more after a resume, then another phase from the weights."""
    output = tmp_path / "run"
    with socket.socket() as probe:  # the default port may belong to another run on this machine
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ("deepspeed", "--num_gpus", "2", "--master_port", port, PRETRAIN, "--ds_config", config_file)
    two = ("--set", "neomoba.parallel.tensor_model_parallel_size=2", "neomoba.log.tensorboard=true")
    first = start(*launch, "--output_dir", output, "--max_steps", "3", *two)
    assert first.returncode == 0, first.stderr
    second = start(*launch, "--output_dir", output, "--resume", "must", "--profile", *two)
    assert second.returncode == 0, second.stderr
    lines = metrics(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    promised = {"step", "phase", "loss", "grad_norm", "lr", "tokens", "aux_loss", "full_attention"}
    assert all(promised <= line.keys() for line in lines)
    assert {"validation_loss"} <= lines[2].keys() & lines[5].keys()
    assert lines[5]["loss"] < lines[0]["loss"]
    assert load_config(output / "config.json").parallel.tensor_model_parallel_size == 2
    assert list((output / "tensorboard").iterdir())
    assert (output / "profile" / "rank0.trace.json").stat().st_size > 1000
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"step_3", "step_6"}

    again = pretrain("--ds_config", config_file, "--output_dir", output, "--resume", "none")
    assert again.returncode == MISTAKE
    assert "holds a run already" in again.stderr

    one = pretrain("--ds_config", config_file, "--output_dir", tmp_path / "one", "--max_steps", "6")
    assert one.returncode == 0, one.stderr
    for line, single in zip(lines, metrics(tmp_path / "one"), strict=True):
        assert line["loss"] == pytest.approx(single["loss"], rel=2e-4)
        assert line["grad_norm"] == pytest.approx(single["grad_norm"], rel=2e-4)

    longer = (
        "--set",
        "neomoba.phase.name=next",
        "neomoba.phase.sequence_length=256",
        "neomoba.phase.tokens_per_update=2048",
    )
    following = pretrain(
        *("--ds_config", config_file, "--output_dir", tmp_path / "next", "--init_from", output, "--max_steps", "1"),
        *longer,
    )
    assert following.returncode == 0, following.stderr
    entry = metrics(tmp_path / "next")[0]
    assert entry["step"] == 1
    assert entry["phase"] == "next"
    assert entry["loss"] < lines[2]["loss"]
