"""Labelled texts: GLUE's own files, jsonl or parquet with the hub's column names, or the hub itself.

A folder holds one folder per task, named as in GLUE's download (SST-2) or as the task (sst2), with train, dev and test
files: .tsv (read without quotes, as they are meant), .jsonl or .parquet; `validation` is as good a name as `dev`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neomoba_dist.config.text_tasks import TextTask
from neomoba_dist.data.errors import AgreedError

HUB = "hub"
SUFFIXES = (".tsv", ".jsonl", ".parquet")
Record = dict[str, Any]


@dataclass(frozen=True)
class LabelledText:
    """texts: one, or a pair (contrastive: query, positive, maybe negative). label: of a class, a score, or None."""

    texts: tuple[str, ...]
    label: float | None
    index: str


def read_split(place: str, name: str, task: TextTask, split: str) -> list[LabelledText] | None:
    """The texts of one split of the task `name`; None where there is none. Raises DataError, in one line.

    place: a folder, or "hub". For contrastive pairs `place` may be the file itself.
    """
    if place == HUB:
        return _of_records(f"glue/{name}", _hub_records(name, split), task)
    path = _find(Path(place), name, task, split)
    if path is None:
        return None
    try:
        return _of_records(str(path), _records(path, task), task)
    except (OSError, UnicodeDecodeError) as error:
        raise AgreedError(f"{path}: cannot be read ({error})") from error


def _find(place: Path, name: str, task: TextTask, split: str) -> Path | None:
    if place.is_file():
        return place
    folders = [place / task.folder, place / name, place]
    stems = [split, split.replace("dev", "validation")]
    found = (folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _records(path: Path, task: TextTask) -> Iterator[Record]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise AgreedError(f"{path}: line {number} is not JSON ({error}); mend or delete it") from error
        return
    header = lines[0].rstrip("\r").split("\t")
    if any(_column(header, spellings) for spellings in task.texts):
        lines = lines[1:]
    elif task.plain:
        header = list(task.plain)
    else:
        raise AgreedError(f"{path}: its first line has none of the columns {_spelt(task)}; give it a header")
    for line in lines:
        yield dict(zip(header, line.rstrip("\r").split("\t"), strict=False))


def _hub_records(name: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset

        yield from load_dataset("nyu-mll/glue", name, split=split.replace("dev", "validation"))
    except Exception as error:  # whatever the library and the network raise
        reason = " ".join(str(error).split())[:200]
        raise AgreedError(f"hub: {name} cannot be loaded ({reason}); give a folder with --data_dir") from error


def _of_records(path: str, records: Iterator[Record], task: TextTask) -> list[LabelledText]:
    found = []
    for number, record in enumerate(records):
        columns = [_column(record, spellings) for spellings in task.texts]
        texts = tuple(str(record[column]) for column in columns if column and record[column] is not None)
        if len(texts) < (2 if task.embeds else len(task.texts)):
            raise AgreedError(f"{path}: record {number} lacks one of the columns {_spelt(task)}; mend or delete it")
        index = str(record.get("index", record.get("idx", record.get("id", number))))
        found.append(LabelledText(texts, None if task.embeds else _label(path, number, record, task), index))
    return found


def _label(path: str, number: int, record: Record, task: TextTask) -> float | None:
    """None in a test set, whose labels nobody has (the hub writes -1)."""
    column = _column(record, task.target)
    value = None if column is None else record[column]
    if value is None or str(value) in ("-1", "-1.0", ""):
        return None
    if str(value) in task.labels:
        return task.labels.index(str(value))
    try:
        label = float(value)
    except ValueError:
        label = -1.0
    if (task.labels and label not in range(len(task.labels))) or label < 0:
        known = ", ".join(task.labels) or "numbers from 0 on"
        raise AgreedError(f"{path}: record {number} has the label {value!r}; known are {known}")
    return label


def _column(names: Any, spellings: tuple[str, ...]) -> str | None:
    return next((spelling for spelling in spellings if spelling in names), None)


def _spelt(task: TextTask) -> str:
    return ", ".join("/".join(spellings) for spellings in task.texts)
