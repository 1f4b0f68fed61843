"""MTEB: tasks on embeddings of texts by the mteb package (arXiv 2210.07316), among them LongEmbed's long retrieval.

mteb:STSBenchmark runs that task, mteb:LongEmbed all of a benchmark. LEMBPasskeyRetrieval and LEMBNeedleRetrieval
(arXiv 2404.12096) hide a key in texts of 256 to 32,768 tokens; --lengths picks some. Without --data-dir mteb loads its
data from the hub; DIR/TASK holds a copy of the task's data set.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int
from evals.score_table import csv as csv
from evals.score_table import figure as figure
from evals.score_table import scores as scores
from evals.score_table import table as table
from evals.tasks import ATTENTION

if TYPE_CHECKING:
    from evals.load import Subject
    from evals.tasks import Result

TITLE = "MTEB"


@dataclass(frozen=True)
class Plan:
    """Tasks of the mteb package, and where texts are cut, in tokens. local: the data lie in folders of the user's."""

    tasks: list[Any]
    max_tokens: int
    local: bool


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    parser.add_argument(
        "--max-tokens", type=positive_int, metavar="N",
        help="longer texts lose their end (default: what the model was made for)",
    )  # fmt: skip


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Find the tasks and their data. Raises EvalError."""
    if not args.tasks["mteb"]:
        raise EvalError("--tasks mteb: name its tasks or a benchmark, for example mteb:STSBenchmark,mteb:LongEmbed")
    if args.limit:
        raise EvalError("--limit: mteb runs whole tasks only; leave --limit out, or mteb out of --tasks")
    tasks = [task for name in args.tasks["mteb"] for task in _tasks(name)]
    for task in tasks:
        _choose_lengths(task, args.lengths)
        if args.data_dir:
            _use_folder(task, args.data_dir / task.metadata.name)
    max_tokens = args.max_tokens or subject.config.model.max_position_embeddings
    subject.check_length("--max-tokens", max_tokens)
    return Plan(tasks, max_tokens, args.data_dir is not None)


def _tasks(name: str) -> list[Any]:
    """The task of that name, or those of the benchmark."""
    import mteb

    try:
        return [mteb.get_task(name)]
    except (KeyError, ValueError):
        pass
    try:
        return list(mteb.get_benchmark(name).tasks)
    except (KeyError, ValueError):
        raise EvalError(
            f"--tasks mteb:{name}: the mteb package has no such task or benchmark; see mteb available-tasks"
        ) from None


def _choose_lengths(task: Any, lengths: list[int] | None) -> None:
    """Of tasks with a split per length (test_256, ...) keep those that are asked for."""
    splits = task.metadata.eval_splits
    if lengths is None or not all(split.startswith("test_") for split in splits):
        return
    kept = [split for split in splits if int(split.removeprefix("test_")) in lengths]
    if not kept:
        raise EvalError(f"--lengths: {task.metadata.name} has none of them; give some of {', '.join(splits)}")
    task.metadata = task.metadata.model_copy(update={"eval_splits": kept})


def _use_folder(task: Any, folder: Path) -> None:
    if not folder.is_dir():
        path = task.metadata.dataset["path"]
        raise EvalError(f"--data-dir: no {folder}; put a copy of the data set {path} of the hub there")
    dataset = {**task.metadata.dataset, "path": str(folder), "revision": "local"}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})


def run(subject: Subject, plan: Plan) -> Result:
    """The main score of every task and split, and all scores that the package gives."""
    import mteb

    from evals.mteb_model import Encoder

    logging.getLogger("mteb").setLevel(logging.ERROR)
    subject.model.use(subject.own_attention)
    encoder: Any = Encoder(subject, plan.max_tokens)
    rows, everything = [], {}
    for task in plan.tasks:
        name = task.metadata.name
        try:
            # warnings: that there is a newer version of a task, and the like
            with _fresh_cache(plan.local), warnings.catch_warnings(action="ignore"):
                found = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False, co2_tracker=False)
        except (OSError, ValueError, ConnectionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EvalError(f"mteb:{name}: {reason}; is its data set complete in --data-dir?") from error
        for split, subsets in found.task_results[0].scores.items():
            for subset in subsets:
                label = " ".join(part for part in (name, split, subset["hf_subset"]) if part not in ("test", "default"))
                rows.append({
                    "name": label,
                    "metric": task.metadata.main_score,
                    # not a number: a correlation with vectors that are all alike
                    "value": float(subset["main_score"]) if _is_number(subset["main_score"]) else 0.0,
                    "samples": encoder.texts[name, split],
                    "cut": encoder.cut[name, split],
                })  # fmt: skip
                everything[label] = {key: value for key, value in subset.items() if _is_number(value)}
    return {
        "rows": rows,
        "scores": everything,
        "attention": subject.own_attention,
        "max_tokens": plan.max_tokens,
        "mteb_version": mteb.__version__,
    }


@contextmanager
def _fresh_cache(local: bool) -> Iterator[None]:
    """The datasets library keeps what it once read in a folder, and does not see that its files have changed."""
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        if local:
            datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = kept


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def caption(result: Result) -> str:
    """How the numbers were made."""
    cut, texts = (sum(row[key] for row in result["rows"]) for key in ("cut", "samples"))
    return (
        f"Main score of every task, by mteb {result['mteb_version']}. A text's vector is the mean of its last hidden "
        f"states, with {ATTENTION[result['attention']]}; {cut:,} of {texts:,} texts were longer than "
        f"{result['max_tokens']:,} tokens and lost their end."
    )
