"""The command `neomoba`: it names every program of the project, and starts each as if it were called itself."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from neomoba_dist.__main__ import COMMANDS, DATA, usage
from neomoba_dist.errors import MISTAKE
from tests.programs import ROOT, run_program


def test_every_program_has_a_name() -> None:
    programs = {path.stem for path in (ROOT / "launch").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    known = {module.removeprefix("launch.") for module, _ in COMMANDS.values() if module.startswith("launch.")}
    assert programs - known == {"check_hosts"}, "started by the SLURM scripts alone"
    tools = {path.stem for path in (ROOT / "data_tools").glob("*.py") if "\n    run(main" in path.read_text()}
    assert tools == set(DATA)
    assert all(importlib.util.find_spec(module) for module, _ in COMMANDS.values())


@pytest.mark.parametrize("words", [(), ("--help",), ("data",), ("data", "--help")])
def test_it_lists_them(words: tuple[str, ...]) -> None:
    result = run_program("-m", "neomoba_dist", *words)
    assert (result.returncode, result.stdout) == (0, usage() + "\n")
    assert all(name in result.stdout for name in (*COMMANDS, *DATA))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pretrain", "--help"), "--ds_config"),
        (("data", "passkeys", "--help"), "--copies"),
        (("evals", "run", "--help"), "--checkpoint"),
        (("convert", "--help"), "--verify"),
    ],
)
def test_it_starts_them(words: tuple[str, ...], said: str) -> None:
    result = run_program("-m", "neomoba_dist", *words)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout


@pytest.mark.parametrize(("words", "said"), [(("train",), "train: no such"), (("data", "make"), "data make: no such")])
def test_what_is_not_there(words: tuple[str, ...], said: str) -> None:
    result = run_program("-m", "neomoba_dist", *words)
    assert result.returncode == MISTAKE
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_package_needs_no_test_tools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"neomoba": "neomoba_dist.__main__:main"}
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    needed, tools = (
        [line.partition("==")[0] for line in (ROOT / name).read_text().splitlines() if "==" in line]
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert needed[0] == "torch"
    assert {"pytest", "ruff", "mypy", "hypothesis"} <= set(tools)
    assert not set(needed) & set(tools)


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys, runpy; sys.argv = ['neomoba']; runpy.run_module('neomoba_dist', run_name='__main__')"
    code += "; assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("line", "found", "others"),
    [
        ("neomoba p", {"pretrain", "plan"}, {"evals"}),
        ("neomoba data tokenize_", {"tokenize_corpus", "tokenize_chat"}, {"fetch"}),
        ("neomoba evals ", {"run", "bench"}, {"pretrain"}),
        ("neomoba evals bench de", {"decoding"}, {"attention"}),
        ("neomoba pretrain --dry", {"--dry_run"}, {"--resume"}),
        ("neomoba plan --ds_config x.json --gpu", {"--gpus", "--gpu_memory"}, {"--ds_config"}),
        ("neomoba data inspect_shards --objective ", {"mlm", "clm"}, set()),
        ("neomoba evals bench decoding --con", {"--context"}, {"--new"}),
        ("neomoba evals run --task", {"--tasks"}, {"--checkpoint"}),
        ("neomoba convert --inp", {"--input"}, {"--output"}),
    ],
)
def test_the_shell_completes(line: str, found: set[str], others: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    words = [sys.executable, "-m", "neomoba_dist"]
    subprocess.run(words, cwd=ROOT, env={**os.environ, **asked}, check=True, capture_output=True, timeout=60)
    offered = {word.strip() for word in answer.read_text().split("\n")}
    assert found <= offered
    assert not others & offered


TALK = """
import logging, sys
from launch.pretrain import start_talking
start_talking({rank}, {quiet}, {verbose})
print("a step")
logging.getLogger("neomoba_dist.x").info("found")
logging.getLogger("neomoba_dist.x").warning("beware")
"""


@pytest.mark.parametrize(
    ("rank", "quiet", "verbose", "out", "err"),
    [
        (0, False, False, "a step\n", "found\nbeware\n"),
        (1, False, False, "a step\n", "beware\n"),
        (0, True, False, "", "beware\n"),
        (1, False, True, "a step\n", "rank 1: found\nrank 1: beware\n"),
    ],
)
def test_quiet_and_verbose(rank: int, quiet: bool, verbose: bool, out: str, err: str) -> None:
    words = [sys.executable, "-c", TALK.format(rank=rank, quiet=quiet, verbose=verbose)]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (out, err)


def test_quiet_or_verbose() -> None:
    done = run_program("launch/pretrain.py", "--ds_config", "ds_configs/phase1.json", "--quiet", "--verbose")
    assert (done.returncode, done.stderr) == (2, "error: --quiet and --verbose: give one of them\n")


@pytest.mark.parametrize("module", ["data_tools", "evals"])
def test_progress_bars_are_for_terminals(module: str) -> None:
    arguments = "3, 'work', 'item'" if module == "data_tools" else "range(3), 3, 'work', 'item'"
    code = (
        f"from {module}.cli import progress; bar = progress({arguments}); list(bar) if bar.iterable else bar.update(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
