"""`python -m evals` as a user types it: from a checkpoint to the report, and one line for everything that is wrong."""

import importlib
import json
import resource
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import evals.__main__ as program
from evals.load import load_subject
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.errors import MISTAKE
from tests.corpora import make_corpus
from tests.evals.runs import make_config, write_run
from tests.programs import ROOT, run_program

TASKS = ("position_loss", "needle")


def evals(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program("-m", "evals", *arguments)


def test_from_checkpoint_to_report(runs: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "results"
    options = ["--length", 128, "--border", 64, "--rows", 6, "--buckets", 4]
    options += ["--lengths", "64,96", "--depths", "0,100", "--samples", 2, "--seed", 3]
    done = evals(
        "run", "--tasks", "position_loss,needle", "--checkpoint", runs["clm"], "--output", output, *options
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "positions < 64" in done.stdout
    assert "100%" not in done.stderr  # bars are for terminals
    loss, needle = (json.loads((output / f"{task}.json").read_text()) for task in TASKS)
    for result in (loss, needle):
        assert result["checkpoint"] == str(runs["clm"] / "checkpoints" / "step_20")
        assert (result["step"], result["phase"], result["objective"]) == (20, "phase1", "clm")
        assert result["data_fingerprint"] == corpus.fingerprint
        assert result["command"].startswith("python -m evals run --tasks position_loss,needle --checkpoint ")
    assert (loss["length"], loss["rows"], loss["border"]) == (128, 6, 64)
    assert set(loss["summary"]) == {"moba", "full"}
    assert set(loss["summary"]["moba"]) == {"mean", "within", "beyond"}
    assert [len(curve["cells"]) for curve in needle["curves"].values()] == [4, 4]
    assert needle["chance"] == 0.1
    for task in TASKS:
        assert (output / f"{task}.png").read_bytes().startswith(b"\x89PNG")

    again = tmp_path / "again"
    step = runs["clm"] / "checkpoints" / "step_20"
    options += ["--data", corpus.folder, "--device", "cpu"]
    words = ["run", "--tasks", "needle,position_loss", "--checkpoint", step, "--output", again, *options]
    assert program.main([str(word) for word in words]) == 0
    for task, first in (("position_loss", loss), ("needle", needle)):
        second = json.loads((again / f"{task}.json").read_text())
        assert second["curves"] == first["curves"]

    file = tmp_path / "report.html"
    done = evals("report", "--run", runs["clm"], "--eval", output, "--output", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {file}\n"
    assert file.read_text().count("data:image/svg+xml") == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "{prepare,run,score,report,bench,ablation,check-data}"),
        (["run", "--help"], "--depths P,..."),
        (["run", "--tasks", "needle", "--help"], "needle:"),
        (["report", "--help"], "--eval DIR"),
        (["bench", "--help"], "python -m evals bench NAME"),
        (["ablation", "--help"], "--part I/N"),
    ],
)
def test_help_is_quick(arguments: list[str], said: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "evals", *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert said in done.stdout
    # processor time: what the command itself needs, however busy the machine is
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_shows_the_options_of_the_named_tasks_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        program.main(["run", "--help", "--tasks", "position_loss"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--border" in shown
    assert "--depths" not in shown


def run_words(runs: dict[str, Path], *more: object) -> list[object]:
    return ["run", "--tasks", "position_loss,needle", "--checkpoint", runs["mlm"], "--output", "OUT", *more]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--length", 10**6], ("--length 1000000", "give at most that")),
        (["--length", 96, "--border", 96], ("--border 96", "less than --length 96")),
        (["--lengths", 40], ("--lengths", "at least")),
        (["--lengths", 10**7], ("--lengths 10000000", "shorter lengths")),
        (["--lengths", "64,x"], ("--lengths", "'x' is not a whole number of at least 1")),
        (["--depths", "0,120"], ("--depths", "'120' is not a number from 0 to 100")),
        (["--depths", "a"], ("--depths", "'a'")),
        (["--seed", -1], ("--seed", "'-1'")),
        (["--buckets", "linear"], ("--buckets", "'linear'")),
        (["--rows", 0], ("--rows", "'0'")),
        (["--dept", "0"], ("--dept 0", "--help")),
        (["--device", "abacus"], ("--device abacus", "give cpu or cuda")),
        (["--data", "nowhere"], ("--data", "nowhere")),
    ],
)
def test_wrong_options_of_run(
    runs: dict[str, Path],
    more: list[object],
    said: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, run_words(runs, *more), *said)
    assert not list(tmp_path.rglob("*.json"))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[object], *said: str) -> None:
    """The command ends with exit code 1 and one line that holds `said`."""
    assert program.main([str(word) for word in arguments]) == MISTAKE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in said:
        assert part in captured.err


def test_wrong_command_lines(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["rn"], "rn: no such command", "prepare, run, score, report, bench")
    refused(capsys, ["bench", "soup"], "bench soup", "choose from")
    refused(capsys, ["run", "--tasks", "nedle"], "--tasks 'nedle'", "choose from: position_loss, needle")
    refused(capsys, ["run"], "--tasks", "required")
    refused(capsys, run_words({"mlm": tmp_path}), str(tmp_path), "no checkpoint here")
    (tmp_path / "file").touch()
    refused(capsys, [*run_words(runs)[:-1], "file"], "--output file", "give another")
    only = ["run", "--tasks", "position_loss", "--checkpoint", runs["mlm"], "--output", "OUT"]
    refused(capsys, [*only, "--depths", 0], "--depths 0", "--help")
    refused(capsys, ["report", "--run", tmp_path, "--output", "r.html"], f"--run {tmp_path}", "config.json is missing")
    refused(
        capsys, ["report", "--run", runs["mlm"], "--eval", tmp_path, "--output", "r.html"],
        f"--eval {tmp_path}: no results", "python -m evals run --tasks position_loss,needle",
    )  # fmt: skip
    refused(capsys, ["report", "--run", runs["mlm"], "--output", tmp_path], f"--output {tmp_path}", "give another file")


def test_data_that_do_not_fit_the_checkpoint(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus.folder)
    unvalidated = write_run(tmp_path / "none", replace(config, data=replace(config.data, validation=None)))
    capsys.readouterr()
    refused(capsys, run_words({"mlm": unvalidated}), "no validation corpus", "--data")
    moved = write_run(tmp_path / "moved", make_config(tmp_path / "gone"))
    capsys.readouterr()
    refused(capsys, run_words({"mlm": moved}), "gone", "--data", "start in the folder")
    other = make_corpus(tmp_path / "other", "byte_bpe")
    here = write_run(tmp_path / "here", config)
    capsys.readouterr()
    refused(capsys, run_words({"mlm": here}, "--data", other.folder), "another tokenizer", "tokenize_corpus")


def test_a_corpus_that_changed_since_training_is_told(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(corpus.folder)
    load_subject(write_run(tmp_path / "same", config, fingerprint=corpus.fingerprint), None, "cpu")
    assert not caplog.records
    load_subject(write_run(tmp_path / "other", config, fingerprint="0" * 32), None, "cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"warning: {corpus.folder} changed since" in caplog.text


def test_run_without_steps(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((runs["mlm"] / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").touch()
    refused(capsys, ["report", "--run", tmp_path, "--output", tmp_path / "r.html"], "metrics.jsonl holds no step")


def test_bench_dispatches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[Namespace] = []

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--lengths", required=True)

    def run(args: Namespace) -> int:
        given.append(args)
        return 3

    stub = SimpleNamespace(__doc__="A stub.", add_arguments=add_arguments, run=run)
    monkeypatch.setattr(program, "_bench_names", lambda: ["stub"])
    monkeypatch.setattr(importlib, "import_module", {"evals.bench.stub": stub}.__getitem__)
    assert program.main(["bench", "stub", "--lengths", "5"]) == 3
    assert given == [Namespace(lengths="5")]
    refused(capsys, ["bench", "stub"], "--lengths", "python -m evals bench stub --help")
