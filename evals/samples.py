"""results_TIME.json and samples_TASK_TIME.jsonl of a run, with the keys of lm-evaluation-harness.

One key more, `neomoba`: layout, checkpoint, attention and seconds of every task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from evals.cli import write_whole
from evals.tasks import Result, Scores
from evals.work import item_key

NEOMOBA_KEYS = (
    "checkpoint", "checkpoint_hash", "step", "phase", "layout", "device", "dtype", "seconds", "command", "partial",
)  # fmt: skip


def sample_line(
    task: str,
    number: int,
    doc: Mapping[str, Any],
    prompt: str,
    target: Any,
    answer: str,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """One sample in lm-eval's form, but for the prompt, which is named by its hash."""
    return {
        "task": task,
        "doc_id": number,
        "doc": dict(doc),
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": None, "arg_1": dict(settings)}},
        "resps": [[answer]],
        "filtered_resps": [answer],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": item_key(json.dumps(doc, sort_keys=True)),
        "prompt_hash": item_key(prompt),
        "target_hash": item_key(json.dumps(target)),
        **metrics,
    }


def write_run(folder: Path, results: Mapping[str, Result], scores: Mapping[str, Scores], when: datetime) -> Path:
    """results_TIME.json of all tasks of one run; returns its path."""
    found: dict[str, dict[str, Any]] = {}
    for subtasks in scores.values():
        for name, entry in subtasks.items():
            metrics = {key if "," in key else f"{key},none": v for key, v in entry.items() if key != "samples"}
            found[name] = {"alias": name, **metrics}
    samples = {name: entry["samples"] for subtasks in scores.values() for name, entry in subtasks.items()}
    first = next(iter(results.values()))
    content = {
        "results": found,
        "configs": {name: {"task": name} for name in found},
        "versions": dict.fromkeys(found, first["version"]),
        "n-shot": dict.fromkeys(found, 0),
        "n-samples": {name: {"original": n, "effective": n} for name, n in samples.items()},
        "higher_is_better": {name: {} for name in found},
        "config": {"model": "neomoba", "model_args": {"checkpoint": first["checkpoint"]}, "limit": first["partial"]},
        "date": when.timestamp(),
        "model_name": first["checkpoint"],
        "neomoba": {name: {key: result[key] for key in NEOMOBA_KEYS} for name, result in results.items()},
    }
    path = folder / f"results_{stamp(when)}.json"
    write_whole(path, [json.dumps(content, indent=1)])
    return path


def write_samples(folder: Path, task: str, samples: Iterable[Mapping[str, Any]], when: datetime) -> Path:
    """samples_TASK_TIME.jsonl; returns its path."""
    path = folder / f"samples_{task}_{stamp(when)}.jsonl"
    write_whole(path, map(json.dumps, samples))
    return path


def stamp(when: datetime) -> str:
    """As lm-eval names its files."""
    return when.isoformat(timespec="seconds").replace(":", "-")
