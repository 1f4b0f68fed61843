"""Held-out loss, of any model: that of the rows, with the masks or dropped spans, on which training validates."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.cli import EvalError, positive_int
from evals.position_loss import Estimate
from evals.score_table import csv as csv
from evals.score_table import figure as figure
from evals.score_table import scores as scores
from evals.score_table import table as table
from evals.tasks import ATTENTION
from evals.work import Item

if TYPE_CHECKING:
    from evals.load import Subject
    from evals.tasks import Result
    from neomoba_dist.data.batch import Batch

TITLE = "Held-out loss"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    parser.add_argument(
        "--validation-rows", type=positive_int, metavar="N", help="most rows (default: the run's validation_rows)"
    )


def prepare(subject: Subject, args: argparse.Namespace) -> list[Batch]:
    """Batches of one row each. Raises DataError."""
    from neomoba_dist.data.validation import validation_batches

    config = subject.config
    rows = args.validation_rows or config.log.validation_rows
    return validation_batches(
        subject.corpus,
        # no folder for plans: that is for ranks that share a plan out
        replace(config.data, cache=None),
        objective=config.model.objective,
        sequence_length=config.phase.sequence_length,
        micro_batch_size=1,
        rows=min(rows, args.limit or rows),
        pairs=config.model.next_sentence_prediction,
    )


def run(subject: Subject, plan: list[Batch]) -> Result:
    """Mean losses with every kind of attention, over the same labels. Raises EvalError where they are not numbers."""

    def measure(batches: list[Batch]) -> list[dict[str, Any]]:
        (batch,) = batches
        loss = -float(subject.model.log_likelihoods(batch)[0].double().sum())
        return [{"loss": loss, "count": batch.local_valid()}]

    found = {}
    workers = replace(subject.workers, batch_tokens=1)  # a row each: who shares experts makes as many passes as others
    for attention in subject.attentions:
        subject.model.use(attention)
        items = [
            Item(subject.key("validation_loss", subject.corpus.fingerprint, number), len(batch.input_ids), batch)
            for number, batch in enumerate(plan)
        ]
        measured = workers.run(f"validation_loss, {attention}", items, measure)
        sums, counts = (np.array([entry[key] for entry in measured]) for key in ("loss", "count"))
        estimate = Estimate.of(sums, counts)
        if not np.isfinite(estimate.mean):
            raise EvalError(
                f"validation_loss: the loss is not a number; the weights of {subject.checkpoint} are damaged, or no "
                f"row of {subject.corpus.folder} has labels"
            )
        found[attention] = estimate.to_dict()
    return {
        "rows": [
            {"name": name, "metric": "loss", "value": entry["loss"], "samples": len(plan)}
            for name, entry in found.items()
        ],
        "unit": "nats per token",
        "standard_error": {name: entry["standard_error"] for name, entry in found.items()},
        "tokens": int(counts.sum()),
    }


def caption(result: Result) -> str:
    """How the losses were measured."""
    errors = ", ".join(f"{error:.4f} ({ATTENTION[name]})" for name, error in result["standard_error"].items() if error)
    return (
        f"Mean cross entropy of {result['tokens']:,} tokens in {result['rows'][0]['samples']} rows of "
        f"{result['data']}, the ones that training validates on ({result['objective']})."
        + (f" Standard error with rows as units: {errors}." if errors else "")
    )
