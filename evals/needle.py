"""Needle in a haystack: a passkey of some digits hidden at some depth of real text, asked for at the end.

Each digit of the answer is judged twice: against the nine other digits, where a model that does not read the needle has
exactly one chance in ten, because every digit is drawn anew, uniformly; and against the whole vocabulary ("exact": all
are first). How prompts are written and scored: `passkey.py`.

Legend: K digits of the key.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.passkeys import KEY_DIGITS, NEEDLE, QUESTION
from evals.cli import EvalError, list_of, percent, positive_int
from evals.passkey import Prompt, Row, make_prompt, read_text, score, write_row
from evals.tasks import ATTENTION
from evals.work import Item

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table

TITLE = "Needle in a haystack"
CHANCE = 0.1
DEFAULT_SAMPLES = 8
MOST_NEEDLES = 26


@dataclass(frozen=True)
class Plan:
    """All rows, grouped by haystack: the rows of a group differ in depth and key."""

    prompt: Prompt
    groups: list[list[Row]]
    seed: int


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    parser.add_argument(
        "--digits", type=positive_int, default=KEY_DIGITS, metavar="N", help=f"of a key (default: {KEY_DIGITS})"
    )
    parser.add_argument(
        "--needles", type=positive_int, default=1, metavar="N",
        help="named keys in each text, of which one is asked for (default: 1, without a name)",
    )  # fmt: skip
    parser.add_argument(
        "--depths",
        type=list_of(percent),
        default=[0.0, 25.0, 50.0, 75.0, 100.0],
        metavar="P,...",
        help="where the needle lies, in percent of the text (default: 0,25,50,75,100)",
    )


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Write all prompts. Raises EvalError where a length or the tokenizer does not allow it."""
    samples, seed = args.samples or DEFAULT_SAMPLES, args.seed or 0
    samples = min(samples, args.limit or samples)
    if args.needles > MOST_NEEDLES:
        raise EvalError(f"--needles {args.needles}: keys are named by letters; give at most {MOST_NEEDLES}")
    mask = subject.config.model.objective == "mlm"
    prompt = make_prompt(subject.tokenizer, mask=mask, key_digits=args.digits, needles=args.needles)
    trained = subject.config.phase.sequence_length
    shortest = prompt.overhead + 1
    lengths = args.lengths or [trained // part for part in (8, 4, 2, 1) if trained // part > 2 * shortest]
    if not lengths or lengths[0] < shortest:
        raise EvalError(f"--lengths: a prompt takes at least {shortest} tokens; give lengths from there on")
    subject.check_length("--lengths", lengths[-1])
    groups = []
    for length in lengths:
        for sample in range(samples):
            draw = random.Random(f"{seed}/{length}/{sample}")  # the same for ever, whatever else is evaluated
            haystack = read_text(subject.corpus, draw.randrange(subject.corpus.tokens), length - prompt.overhead)
            if len(haystack) < length - prompt.overhead:
                raise EvalError(
                    f"--lengths {length}: {subject.corpus.folder} holds only {len(haystack):,} tokens of text; give "
                    "shorter lengths or another corpus with --data"
                )
            groups.append([write_row(prompt, haystack, depth, seed, sample) for depth in args.depths])
    return Plan(prompt, groups, seed)


def run(subject: Subject, plan: Plan) -> Result:
    """Accuracy by length and depth for all kinds of attention, on the same prompts."""
    curves = {}
    rows = [row for group in plan.groups for row in group]
    for attention in subject.attentions:
        subject.model.use(attention)

        def measure(rows: list[Row]) -> list[dict[str, Any]]:
            choice, top = score(subject.model, plan.prompt, rows)
            return [{"choice": c.tolist(), "top": t.tolist()} for c, t in zip(choice, top, strict=True)]

        items = [Item(subject.key("needle", plan.prompt, row.tokens.tobytes()), row.length, row) for row in rows]
        found = subject.workers.run(f"needle, {attention}", items, measure)
        scores = np.array([[entry["choice"], entry["top"]] for entry in found])  # [rows, 2, K]
        shape = (len(plan.groups), -1, *scores.shape[1:])
        curves[attention] = summarize(plan.groups, scores.reshape(shape).swapaxes(1, 2))
    lengths, depths = sorted({group[0].length for group in plan.groups}), [row.depth for row in plan.groups[0]]
    samples = len(plan.groups) // len(lengths)
    return {
        "lengths": lengths,
        "depths": depths,
        "samples": samples,
        "seed": plan.seed,
        "digits": plan.prompt.key_digits,
        "needles": len(plan.prompt.needles),
        "chance": CHANCE,
        "needle": "...".join(NEEDLE).strip(),
        "question": "...".join(QUESTION).strip(),
        "curves": curves,
    }


def summarize(groups: Sequence[Sequence[Row]], scores: np.ndarray) -> dict[str, Any]:
    """Means over all, by length, and by length and depth. scores bool [groups, 2, depths, K] as `score` gives them."""
    lengths = np.array([group[0].length for group in groups])
    cells = []
    for length in np.unique(lengths):
        for i, row in enumerate(groups[0]):
            cells.append({"length": int(length), "depth": row.depth, **_accuracy(scores[lengths == length][:, :, [i]])})
    by_length = [{"length": int(n), **_accuracy(scores[lengths == n])} for n in np.unique(lengths)]
    return {"all": _accuracy(scores), "by_length": by_length, "cells": cells}


def _accuracy(scores: np.ndarray) -> dict[str, Any]:
    """`accuracy` among ten digits with its standard error over texts, and the share of keys that are `exact`."""
    by_text = scores[:, 0].mean(axis=(1, 2))
    error = float(by_text.std(ddof=1) / len(by_text) ** 0.5) if len(by_text) > 1 else None
    exact = scores[:, 1].all(axis=-1).mean()
    return {"accuracy": float(by_text.mean()), "standard_error": error, "exact": float(exact)}


def scores(result: Result) -> Scores:
    """Both accuracies over all prompts, one entry per kind of attention."""
    items = len(result["lengths"]) * len(result["depths"]) * result["samples"]
    return {
        f"needle_{name}": {
            "acc": curve["all"]["accuracy"],
            "acc_stderr": curve["all"]["standard_error"],
            "exact_match": curve["all"]["exact"],
            "samples": items,
        }
        for name, curve in result["curves"].items()
    }


def csv(result: Result) -> Table:
    """One line per kind of attention, length and depth."""
    keys = ("length", "depth", "accuracy", "standard_error", "exact")
    return [["attention", *keys]] + [
        [name, *("" if cell[key] is None else str(cell[key]) for key in keys)]
        for name, curve in result["curves"].items()
        for cell in curve["cells"]
    ]


def figure(result: Result) -> Figure:
    """Heat maps of depth and length, one per kind of attention."""
    from evals.plots import needle_figure

    return needle_figure(result)


def table(result: Result) -> Table:
    """Accuracy by length."""
    header, columns = ["prompt, tokens"], []
    for name, curve in result["curves"].items():
        header += [f"{ATTENTION[name]}, digits right", f"{ATTENTION[name]}, keys exact"]
        columns.append([*curve["by_length"], curve["all"]])
    labels = [*(f"{length:,}" for length in result["lengths"]), "all"]
    lines = [
        [label, *(text for entry in entries for text in _cells(entry))]
        for label, *entries in zip(labels, *columns, strict=True)
    ]
    chance = [f"{100 * result['chance']:.1f} %", f"{100 * result['chance'] ** result['digits']:.3g} %"]
    return [header, *lines, ["chance", *chance * len(columns)]]


def _cells(entry: dict[str, Any]) -> list[str]:
    error = f" ± {100 * entry['standard_error']:.1f}" if entry["standard_error"] is not None else ""
    return [f"{100 * entry['accuracy']:.1f}{error} %", f"{100 * entry['exact']:.1f} %"]


def caption(result: Result) -> str:
    """How the map was made."""
    how = (
        "the digits of the answer are masked together"
        if result["objective"] == "mlm"
        else "the digits of the answer are scored with the true digits before them"
    )
    many = result.get("needles", 1)
    others = f"{many - 1} other keys, with other names, lie elsewhere in the text. " if many > 1 else ""
    return (
        f"A key of {result['digits']} random digits ({result['needle']}) lies at some depth of text from "
        f"{result['data']} and is asked for at the end ({result['question']}); {how}. Digits right: the true digit "
        f"beats the nine others; chance is {100 * result['chance']:.0f} %. Keys exact: all digits are first in the "
        f"whole vocabulary. {others}{result['samples']} texts per length, at each depth with a new key; ±: standard "
        "error over texts."
    )
