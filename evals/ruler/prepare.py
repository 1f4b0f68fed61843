"""Samples of RULER, written once: FOLDER/LENGTH/TASK/validation.jsonl in RULER's format, and FOLDER/manifest.json.

A set that is already there, made from the same things with the same settings, is kept. Every sample has its own random
stream, so that no set depends on another one, nor on how many samples there are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, progress, write_whole
from evals.ruler.fit import TokenCounter, TooShort, fit
from evals.ruler.generators import Source, draft
from evals.ruler.material import Material, Question
from evals.ruler.request import Request
from evals.ruler.sets import RULER_TASKS
from evals.ruler.wording import read_wording
from evals.work import item_key

if TYPE_CHECKING:
    pass

MANIFEST = "manifest.json"
VERSION = 1  # of the generators: another one makes all sets anew


def command(args: argparse.Namespace) -> int:
    """`python -m evals prepare ruler`."""
    from neomoba_dist.data.tokenizer import load_tokenizer

    tasks = args.only or list(RULER_TASKS)
    unknown = [task for task in tasks if task not in RULER_TASKS]
    if unknown:
        raise EvalError(f"--only {unknown[0]}: no such task of RULER; choose from: {', '.join(RULER_TASKS)}")
    request = Request.of(args, args.output, load_tokenizer(args.tokenizer), tasks)
    made = prepare(request)
    print(f"{args.output}: {len(tasks) * len(request.lengths)} sets, {made} of them made now")
    return 0


def prepare(request: Request) -> int:
    """Write all sets that are not there yet; returns how many. Raises EvalError."""
    wording = read_wording(request.ruler_root)
    material = Material(request.paths, max(request.lengths))
    count = TokenCounter(request.tokenizer)
    manifest = read_manifest(request.folder) if (request.folder / MANIFEST).is_file() else {}
    made = 0
    for length in request.lengths:
        for name in request.tasks:
            task, place = RULER_TASKS[name], f"{length}/{name}"
            facts = {
                "fit": request.fit,
                "tokenizer": request.tokenizer.sha256,
                "seed": request.seed,
                "asked_samples": request.samples,
                "wording": wording.source,
                "wording_sha256": wording.sha256,
            }
            if request.fit == "exact":
                facts["material"] = material.hash_of(task.kind, task.haystack, task.dataset)
            key = item_key(VERSION, place, *facts.values())
            file = request.folder / place / "validation.jsonl"
            known = manifest.get(place)
            if known and known["key"] == key and file.is_file() and _sha256(file) == known["sha256"]:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if request.fit == "nvidia":
                from evals.ruler.nvidia import run_script

                run_script(request, name, length, wording)
            else:
                source = Source(task, length, wording, material, count)
                bar = progress(_samples(request, name, source), request.samples, f"prepare {place}", "sample")
                write_whole(file, map(json.dumps, bar))
            manifest[place] = {"key": key, "sha256": _sha256(file), **facts, **_measures(file, length)}
            _write_manifest(request.folder, manifest)
            made += 1
    return made


def _samples(request: Request, name: str, source: Source) -> Iterator[dict[str, Any]]:
    """RULER's fields, and for needles what is asked for and its depth in percent."""
    task, length = source.task, source.length
    head, _ = request.tokenizer.document_borders  # stands before a prompt, see task.py
    reserved, guess, index, refused = task.generated + len(head), length // 20, 0, None
    questions: Sequence[Question | None] = [None] * request.samples
    if task.dataset:
        questions = source.material.questions(task.dataset).questions
    for number, question in enumerate(questions):
        if index == request.samples:
            return
        one = draft(source, random.Random(f"{request.seed}/{name}/{length}/{number}"), question)
        try:
            prompt, tokens, guess = fit(one, length, reserved, source.count, guess)
        except TooShort as error:
            refused = error
            if question is None:
                break
            continue  # a question whose own documents are longer
        yield {
            "index": index,
            "input": prompt.removesuffix(one.prefix),
            "outputs": one.outputs,
            "length": tokens + task.generated,
            "length_w_model_temp": tokens + task.generated,
            "answer_prefix": one.prefix,
            **one.more,
        }
        index += 1
    if refused is not None and not index:
        raise EvalError(f"--lengths {length}: too short for {name}: {refused}; give longer ones or leave the task out")


def _measures(file: Path, length: int) -> dict[str, Any]:
    """How many samples a set has, and how full the emptiest is, as a share of the length."""
    lengths = [sample["length"] for sample in read_samples(file)]
    return {"samples": len(lengths), "least_filled": round(min(lengths) / length, 4)}


def read_samples(file: Path) -> Iterator[dict[str, Any]]:
    """Of a prepared set or of a file of predictions. Raises EvalError."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise EvalError(f"{file}: cannot be read ({error}); prepare the data again") from error


def read_set(folder: Path, length: int, task: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of one set, checked against the manifest. Raises EvalError."""
    place = f"{length}/{task}"
    file = folder / place / "validation.jsonl"
    if place not in manifest:
        there = ", ".join(sorted({p.split("/")[0] for p in manifest}, key=int))
        raise EvalError(
            f"--prepared {folder}: no samples of {task} at {length} tokens; its lengths are {there or 'none'}; make "
            f"them with: python -m evals prepare ruler --lengths {length}"
        )
    if not file.is_file() or _sha256(file) != manifest[place]["sha256"]:
        raise EvalError(f"{file}: not the file that {MANIFEST} names (changed or missing); prepare the data again")
    return list(read_samples(file))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Set -> what it was made from. Raises EvalError."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"--prepared {folder}: {MANIFEST} cannot be read ({error}); make it with: python -m evals prepare ruler"
        ) from error


def _write_manifest(folder: Path, sets: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, [json.dumps({"format": "neomoba-ruler", "sets": sets}, indent=1)])


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
