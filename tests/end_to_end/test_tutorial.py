"""docs/tutorial.md from its first command to its last, on CPUs: as printed, but for short sizes and its own folder."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from neomoba_dist.config import load_config
from tests.corpora import standard_library_texts
from tests.end_to_end.test_readme import Command, parse, run_to_the_end, shell_lines
from tests.programs import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
BIN = Path(sys.executable).parent
VALIDATION = ("heapq.py", "bisect.py")
# what the page says behind a flag, and the most that stands there here
SHORT = {"--vocab_size": "5000", "--lengths": "2048", "--samples": "2", "--num_gpus": "2", "--nproc-per-node": "2"}
MODEL = {
    "vocab_size": 5000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "moba_block_size": 16,
    "hybrid_layer_count": 1,
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def moved(text: str, folder: Path) -> str:
    """The page's paths in `folder`."""
    return text.replace("runs/tutorial", str(folder / "tutorial")).replace("my_texts", str(folder / "my_texts"))


def settings(command: Command, folder: Path) -> list[str]:
    """Words that make a phase short: its network, its rows by its number, two updates of four rows."""
    place = (command.values("--output_dir") or command.values("--ds_config"))[0]
    number = re.search(r"phase(\d)", place)
    assert number, command.line
    length = 32 << int(number[1])
    keys: dict[str, Mapping[str, object]] = {
        "model": MODEL,
        "phase": {"steps": 2, "warmup_steps": 1, "sequence_length": length, "tokens_per_update": 4 * length},
        "data": {"cache": folder / "cache"},
        "log": {"validate_every": 1, "validation_rows": 2},
    }
    values = [f"neomoba.{block}.{key}={value}" for block, found in keys.items() for key, value in found.items()]
    return ["--set", "train_micro_batch_size_per_gpu=1", "zero_optimization.reduce_bucket_size=100000", *values]


def shortened(line: str, folder: Path) -> list[str]:
    """The words to run for a line of the page."""
    command = parse(line)
    assert command is not None
    words = shlex.split(moved(line, folder))
    for place, flag in enumerate(words[:-1]):
        known = words[place + 1]
        if flag in SHORT and not (known.isdigit() and int(known) < int(SHORT[flag])):
            words[place + 1] = SHORT[flag]
    if command.program[0] == "launch/pretrain.py" or command.program[-1] == "data_tools.plan_rows":
        words += settings(command, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--master-port", port],
    }[words[0]]
    return [*launcher, *words[1:]]


def page_lines() -> list[str]:
    """The commands of the page, without the set-up."""
    return [line for line in shell_lines(TUTORIAL) if parse(line) is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With texts of the reader's own."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name, text in standard_library_texts().items():
        file = folder / "my_texts" / ("validation" if name in VALIDATION else "train") / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """What each command of the page says, all run in order."""
    return {line: run_to_the_end(*shortened(line, folder), timeout=240) for line in page_lines()}


def test_the_page_goes_from_text_to_a_table(folder: Path) -> None:
    """So that the other tests cannot pass on nothing; and what they run is what is printed but for sizes."""
    names = ["clean", "train_tokenizer", "tokenize_corpus", "verify_shards", "plan_rows"]
    launched = ["launch/plan.py", "launch/pretrain.py", "launch/convert.py", "launch/generate.py"]
    wanted = [("-m", f"data_tools.{name}") for name in names] + [(name,) for name in launched]
    wanted += [("-m", "evals", *words) for words in (("prepare", "ruler"), ("run",), ("report",))]
    programs = [command.program for line in page_lines() if (command := parse(line))]
    assert list(dict.fromkeys(programs)) == wanted
    line = next(line for line in page_lines() if "--num_gpus 8" in line and "phase3" in line)
    words = shortened(line, folder)
    assert words[words.index("--num_gpus") + 1] == "2"
    assert f"neomoba.data.train={folder}/tutorial/train" in words
    assert words.index("neomoba.phase.tokens_per_update=1024") > words.index("neomoba.phase.tokens_per_update=262144")
    assert "runs/tutorial" not in shlex.join(words)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_command_runs(folder: Path, printed: dict[str, str]) -> None:
    tutorial = folder / "tutorial"
    for run in ("phase1", "phase2", "phase3", "cpu/phase1", "cpu/phase2", "cpu/phase3", "eight/phase3"):
        assert (tutorial / run / "checkpoints" / "step_2" / "index.json").is_file(), run
    tables = {line: said for line, said in printed.items() if "evals run" in line}
    assert len(tables) == 3
    for line, said in tables.items():
        assert "score in % at tokens" in said, line
        assert re.search(r"average of (6|2)\b", said), line
    assert (tutorial / "evaluation" / "ruler.csv").is_file()
    assert "RULER" in (tutorial / "report.html").read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("printed")
def test_the_exported_folder_writes(folder: Path) -> None:
    (code,) = blocks("python")
    assert "The first" in run_to_the_end(sys.executable, "-c", moved(code, folder), timeout=240)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("printed")
def test_the_chain_of_jobs_is_submitted(folder: Path) -> None:
    """By the script itself; sbatch is one that only writes down what it is told. tests/slurm has the real one."""
    (script,) = blocks("bash")
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\necho "$*" >> {folder}/jobs\necho 7\n', encoding="utf-8")
    sbatch.chmod(0o755)
    run_to_the_end("env", f"PATH={sbatch.parent}:{os.environ['PATH']}", "bash", "-c", moved(script, folder), timeout=60)
    jobs = (folder / "jobs").read_text(encoding="utf-8").splitlines()
    assert len(jobs) == 3
    for number, job in enumerate(jobs, 1):
        config = folder / "tutorial" / f"phase{number}.json"
        assert f"launch/slurm/pretrain.sbatch {config} {folder}/tutorial/slurm/phase{number}" in job
        assert load_config(config).plan(64).gradient_accumulation_steps >= 1
