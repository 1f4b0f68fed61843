"""GLUE: a checkpoint of launch/finetune.py on the development sets of its task, judged as published."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.cli import EvalError
from evals.samples import sample_line
from evals.score_table import csv as csv
from evals.score_table import figure as figure
from evals.score_table import scores as scores
from evals.score_table import table as table
from evals.tasks import ATTENTION
from evals.work import Item
from neomoba_dist.config.text_tasks import GLUE, TEXT_TASKS

if TYPE_CHECKING:
    from evals.load import Subject
    from evals.tasks import Result
    from neomoba_dist.data.examples import Example, Examples

TITLE = "GLUE"


@dataclass(frozen=True)
class Plan:
    """The splits of one task, by name."""

    task: str
    splits: dict[str, Examples]


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """No options but the common ones: --data-dir, by default the files that the checkpoint was fine-tuned on."""


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Read the task's files. Raises EvalError where the checkpoint is not fine-tuned on it, or there are no files."""
    from neomoba_dist.data.examples import encode_examples
    from neomoba_dist.data.text_files import read_split
    from neomoba_dist.model.text_heads import SCORE_UNIT

    name = subject.config.finetune.tasks
    if name not in GLUE:
        raise EvalError(
            f"--tasks glue: {subject.checkpoint} is not fine-tuned on a task of GLUE; give a run of launch/finetune.py"
        )
    other = [part for part in args.tasks["glue"] if part != name]
    if other:
        raise EvalError(
            f"--tasks glue:{other[0]}: {subject.checkpoint} is fine-tuned on {name}; give --tasks glue:{name}"
        )
    task, place = TEXT_TASKS[name], str(args.data_dir or subject.config.data.train)
    splits = {}
    for split in task.validation:
        texts = read_split(place, name, task, split)
        if texts is not None:
            length, unit = subject.config.phase.sequence_length, 1.0 if task.labels else SCORE_UNIT
            found = encode_examples(
                texts[: args.limit], subject.tokenizer, length, pairs=False, unit=unit, name=f"{place} {name} {split}"
            )
            if any(example.label is None for example in found.examples):
                raise EvalError(f"{place}: {name} {split} lacks labels; give files that have them with --data-dir")
            splits[split] = found
    if not splits:
        raise EvalError(f"{place}: holds no {task.folder}/{task.validation[0]}.tsv; name GLUE's folder with --data-dir")
    return Plan(name, splits)


def run(subject: Subject, plan: Plan) -> Result:
    """Outputs for every text, and the task's metrics."""
    from neomoba_dist.generate.stage import batch_of
    from neomoba_dist.train.finetune import label, split_labels
    from neomoba_dist.train.text_scores import predictions, scores

    def measure(examples: list[Example]) -> list[dict[str, Any]]:
        documents, types = [e.documents[0] for e in examples], [e.token_types(0) for e in examples]
        batch = batch_of(documents, "cpu", types)
        return [{"outputs": row} for row in subject.model.text_outputs(batch).tolist()]

    task, rows, lines = TEXT_TASKS[plan.task], [], []
    commonest: dict[str, float] = {}
    subject.model.use(subject.own_attention)
    for split, examples in plan.splits.items():
        items = [
            Item(subject.key("glue", example.documents), len(example.documents[0]), example)
            for example in examples.examples
        ]
        found = subject.workers.run(f"glue {plan.task} {split}", items, measure)
        outputs, truth = np.array([entry["outputs"] for entry in found]), split_labels(examples, plan.task)
        rows += [
            {"name": plan.task, "metric": label(metric, split), "value": value, "samples": len(examples)}
            for metric, value in scores(task, outputs, truth).items()
        ]
        if task.labels:
            commonest[split] = float(np.bincount(truth).max() / len(truth))
        guesses = predictions(task, outputs).tolist()
        for number, example in enumerate(examples.examples):
            doc = {"split": split, "index": example.index}
            answer, prompt = str(guesses[number]), str(example.documents[0])
            lines.append(sample_line("glue", number, doc, prompt, float(truth[number]), answer, {}, {}))
    return {"rows": rows, "attention": subject.own_attention, "commonest": commonest, "sample_lines": lines}


def caption(result: Result) -> str:
    """How the numbers were made."""
    shares = ", ".join(f"{100 * share:.1f} % ({split})" for split, share in result["commonest"].items())
    return (
        f"Development set of {result['rows'][0]['name']}, by the fine-tuned head of {result['checkpoint']}, with "
        f"{ATTENTION[result['attention']]}; metrics of scikit-learn and scipy."
        + (f" Share of the commonest class: {shares}." if shares else "")
    )
