"""RULER's scores as published: strings found in the prediction, averages, the effective length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.cli import EvalError, print_table, write_whole
from evals.results import write_csv
from evals.ruler.prepare import read_samples
from evals.ruler.sets import RULER_TASKS
from evals.tasks import Table

EFFECTIVE = 85.6  # Llama2-7B at 4K, the paper's threshold
_CONTROL = re.compile(r"[\x00-\x1f]")


def shares(metric: str, prediction: str, references: Sequence[str]) -> float:
    """The share of references that stand in a prediction, of 1; metric "part": 1 where any does."""
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [reference.lower() in text for reference in references]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def score_set(task: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the predictions of one task at one length: score and its standard error in percent, samples, empty ones."""
    found = [shares(RULER_TASKS[task].metric, line["pred"], line["outputs"]) for line in lines]
    mean, n = sum(found) / len(found), len(found)
    error = (sum((share - mean) ** 2 for share in found) / (n - 1) / n) ** 0.5 if n > 1 else None
    return {
        "task": task,
        "score": round(100 * mean, 2),
        "standard_error": None if error is None else round(100 * error, 2),
        "samples": n,
        "empty": sum(not _CONTROL.sub("\n", line["pred"].strip()).strip() for line in lines),
        "failed": sum("error" in line.get("others", {}) for line in lines),
    }


def score_folder(
    folder: Path, lengths: Sequence[int] | None = None, tasks: Sequence[str] = tuple(RULER_TASKS)
) -> dict[str, Any]:
    """Predictions in FOLDER/LENGTH/TASK.jsonl; writes FOLDER/LENGTH/summary.csv as RULER's evaluate.py does.

    lengths: None: all that are there.

    Returns lengths, scores, averages of the tasks by length, their averages weighted to long and short lengths, and the
    effective length. Raises EvalError.
    """
    if lengths is None:
        found_folders = folder.iterdir() if folder.is_dir() else ()
        lengths = sorted(int(path.name) for path in found_folders if path.name.isdecimal())
    scores: list[dict[str, Any]] = []
    for length in lengths:
        there = [task for task in tasks if (folder / str(length) / f"{task}.jsonl").is_file()]
        found = []
        for task in there:
            file = folder / str(length) / f"{task}.jsonl"
            try:
                found.append(score_set(task, list(read_samples(file))))
            except (KeyError, ZeroDivisionError) as error:
                raise EvalError(f"{file}: not predictions in RULER's format ({error}); run the task again") from error
        scores += [{"length": length, **entry} for entry in found]
        rows = [["Tasks", *there], ["Score", *(str(entry["score"]) for entry in found)]]
        rows += [["Nulls", *(f"{entry['empty']}/{entry['samples']}" for entry in found)]]
        # RULER writes a data frame: its columns' numbers are the header
        write_csv(folder / str(length) / "summary.csv", [[str(i) for i in range(len(there) + 1)], *rows])
    if not scores:
        raise EvalError(f"{folder}: no predictions of RULER here; make them with: python -m evals run --tasks ruler")
    return {"lengths": list(lengths), "scores": scores, **summarize(lengths, scores)}


def summarize(lengths: Sequence[int], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages over tasks and lengths. A length counts where it has every task that any length has."""
    tasks = [task for task in RULER_TASKS if any(entry["task"] == task for entry in scores)]
    averages = {}
    for length in lengths:
        found = [entry["score"] for entry in scores if entry["length"] == length]
        averages[length] = round(sum(found) / len(found), 2) if len(found) == len(tasks) else None
    whole = [average for average in averages.values() if average is not None]
    weights = range(1, len(whole) + 1)

    def weighted(values: Sequence[float]) -> float | None:
        total = sum(weight * value for weight, value in zip(weights, values, strict=True))
        return round(total / sum(weights), 2) if values else None

    good = [length for length, average in averages.items() if average is not None and average >= EFFECTIVE]
    return {
        "tasks": tasks,
        "averages": [{"length": length, "average": average} for length, average in averages.items()],
        "weighted_to_long": weighted(whole),
        "weighted_to_short": weighted(whole[::-1]),
        "effective_length": max(good, default=None),
        "threshold": EFFECTIVE,
    }


def write_predictions(file: Path, samples: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """In the format of RULER's call_api.py. `index` is the number of the line: RULER's own is no identity."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        {
            "index": number,
            "pred": result.get("text", ""),
            "input": sample["input"],
            "outputs": sample["outputs"],
            "others": {"error": result["error"]} if "error" in result else {},
            "truncation": -1,
            "length": sample["length"],
        }
        for number, (sample, result) in enumerate(zip(samples, found, strict=True))
    )
    write_whole(file, map(json.dumps, lines))


def score_table(result: Mapping[str, Any]) -> Table:
    """Tasks down, lengths to the right; below the averages."""
    lengths = result["lengths"]
    found = {(entry["task"], entry["length"]): entry["score"] for entry in result["scores"]}
    lines = [["score in % at tokens", *(f"{length:,}" for length in lengths)]]
    lines += [[task, *(number(found.get((task, length))) for length in lengths)] for task in result["tasks"]]
    averages = {entry["length"]: entry["average"] for entry in result["averages"]}
    many = len(result["tasks"])
    lines.append([f"average of {many}" if many > 1 else "average", *(number(averages[n]) for n in lengths)])
    return lines


def number(score: float | None) -> str:
    """A score, or a dash."""
    return "-" if score is None else f"{score:.1f}"


def effective(result: Mapping[str, Any]) -> str:
    """The effective length, or what there is instead."""
    length = result["effective_length"]
    return "none" if length is None else f"{length:,}"


def command(output: Path) -> int:
    """`python -m evals score`: prints the table of OUTPUT/ruler, or of a folder of predictions itself."""
    folder = output / "ruler" if (output / "ruler").is_dir() else output
    found = score_folder(folder)
    print_table(score_table(found))
    print(f"effective length, tokens: {effective(found)}")
    return 0
