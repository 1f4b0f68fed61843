"""Result files of the tasks: OUTPUT/NAME.json. One header for all, the task's own entries beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import EvalError, write_whole
from evals.tasks import TASKS, Result, Table

if TYPE_CHECKING:
    from evals.load import Subject

FORMAT = "neomoba-eval"
VERSION = 1


def header(subject: Subject, task: str, command: str, seconds: float, partial: int | None) -> Result:
    """What was evaluated, on what, by which command, and how long it took. partial: the value of --limit."""
    config, corpus = subject.config, subject.given_corpus
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "checkpoint": str(subject.checkpoint),
        "step": subject.step,
        "phase": config.phase.name,
        "objective": config.model.objective,
        "trained_length": config.phase.sequence_length,
        "data": None if corpus is None else str(corpus.folder),
        "data_fingerprint": None if corpus is None else corpus.fingerprint,
        "unigram_entropy": None if corpus is None else corpus.unigram_entropy,
        "checkpoint_hash": subject.identity,
        "layout": {axis: subject.model.mesh[axis].size for axis in ("tp", "pp", "cp", "ep", "dp")},
        "device": str(subject.device),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "partial": partial,
        "command": command,
    }


def write_result(folder: Path, result: Result) -> Path:
    """Write `folder`/TASK.json whole or not at all; returns its path."""
    path = folder / f"{result['task']}.json"
    write_whole(path, [json.dumps(result, indent=1, allow_nan=False)])
    return path


def write_csv(path: Path, lines: Table) -> None:
    """The numbers behind a plot."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def read_results(folder: Path) -> dict[str, Result]:
    """The results in `folder` by task, in the order of the table. Raises EvalError on none or a damaged one."""
    found = {}
    for task in TASKS:
        path = folder / f"{task}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvalError(f"{path}: cannot be read ({error}); run the task again") from error
        if not isinstance(result, dict) or (result.get("format"), result.get("version")) != (FORMAT, VERSION):
            raise EvalError(f"{path}: not a result of {FORMAT} version {VERSION}; run the task again")
        found[task] = result
    if not found:
        tasks = ",".join(name for name, task in TASKS.items() if task.usual)
        raise EvalError(
            f"--eval {folder}: no results here; make them with: python -m evals run --tasks {tasks} "
            f"--checkpoint DIR --output {folder}"
        )
    return found
