"""Result files of the tasks: OUTPUT/NAME.json. One header for all, the task's own entries beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import EvalError
from evals.tasks import TASKS, Result

if TYPE_CHECKING:
    from evals.load import Subject

FORMAT = "neomoba-eval"
VERSION = 1


def header(subject: Subject, task: str, command: str, seconds: float) -> Result:
    """What was evaluated, on what, by which command, and how long it took."""
    config = subject.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "checkpoint": str(subject.checkpoint),
        "step": subject.step,
        "phase": config.phase.name,
        "objective": config.model.objective,
        "trained_length": config.phase.sequence_length,
        "data": str(subject.corpus.folder),
        "data_fingerprint": subject.corpus.fingerprint,
        "unigram_entropy": subject.corpus.unigram_entropy,
        "device": str(subject.device),
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "seconds": seconds,
        "command": command,
    }


def write_result(folder: Path, result: Result) -> Path:
    """Write `folder`/TASK.json whole or not at all; returns its path."""
    path = folder / f"{result['task']}.json"
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


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
        tasks = ",".join(TASKS)
        raise EvalError(
            f"--eval {folder}: no results here; make them with: python -m evals run --tasks {tasks} "
            f"--checkpoint DIR --output {folder}"
        )
    return found
