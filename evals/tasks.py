"""The table of evaluation tasks, and what a task is.

A task is a module `evals.NAME` with the functions of `Task`. It imports torch inside its functions only, so that
`--help` answers at once. `python -m evals run` writes what it returns to OUTPUT/NAME.json and draws OUTPUT/NAME.png;
`python -m evals report` shows the same result again.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject

Result = dict[str, Any]  # what a task measured, as JSON
Table = list[list[str]]  # the header and the rows, as they are printed
Scores = dict[str, dict[str, float | None]]  # name in results_*.json -> metrics, and the number of "samples"

# what sparse layers can run, and its printed name
ATTENTION: Final = {"moba": "MoBA", "sliding_window": "sliding window", "full": "full attention"}


class TaskEntry(NamedTuple):
    """A task: its module, what it measures, and whether it evaluates on a corpus of shards.

    parts: --tasks may name some of its parts, as NAME:PART. usual: a report of a training run that lacks it says so.
    encoder_decoder: whether it runs these.
    """

    module: str
    about: str
    needs_corpus: bool
    parts: bool = False
    usual: bool = False
    encoder_decoder: bool = False


TASKS: Final = {
    "position_loss": TaskEntry(
        "evals.position_loss", "loss of a token by its position in the document", True, usual=True
    ),
    "needle": TaskEntry("evals.needle", "finding a passkey hidden at some depth of a long text", True, usual=True),
    "validation_loss": TaskEntry(
        "evals.validation_loss", "loss of the rows that training validates on", True, encoder_decoder=True
    ),
    "glue": TaskEntry("evals.glue", "a fine-tuned checkpoint on its task of GLUE", False, True),
    "mteb": TaskEntry("evals.mteb_tasks", "embeddings of texts, by the mteb package; mteb:NAME,...", False, True),
    "ruler": TaskEntry("evals.ruler.task", "13 tasks on texts of any length; ruler:vt for one of them", False, True),
    "efficiency": TaskEntry("evals.efficiency", "time and memory by context length, MoBA against full attention", True),
    "attention_map": TaskEntry("evals.attention_map", "where heads look in a real text, with MoBA's blocks", True),
    "lm_eval": TaskEntry("evals.lm_eval_task", "any task of lm-evaluation-harness: lm_eval:NAME", False, True),
}


class Task(Protocol):
    """The functions of a task's module. TITLE: its heading in the report.

    A module may also have `compare(results)`, of several checkpoints by name: a figure and a table for the report.
    """

    TITLE: str

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        """Add the task's own options."""

    def prepare(self, subject: Subject, args: argparse.Namespace) -> Any:
        """Everything that can be refused, before any task runs; raises EvalError. Returns what `run` needs."""

    def run(self, subject: Subject, plan: Any) -> Result:
        """Measure. Returns the task's own entries of the JSON file.

        "sample_lines", if there are any, go to samples_*.jsonl instead; see samples.sample_line.
        """

    def scores(self, result: Result) -> Scores:
        """The metrics for results_*.json."""

    def csv(self, result: Result) -> Table:
        """The numbers behind the plot, the header first."""

    def figure(self, result: Result) -> Figure:
        """The plot of a result."""

    def table(self, result: Result) -> Table:
        """The numbers of a result that belong in a table."""

    def caption(self, result: Result) -> str:
        """How the numbers were made, in a few plain sentences."""


def load_task(name: str) -> Task:
    """The module of a task of the table."""
    return cast(Task, importlib.import_module(TASKS[name].module))
