"""The table of evaluation tasks, and what a task is.

A task is a module `evals.NAME` with the functions of `Task`. It imports torch inside its functions only, so that
`--help` answers at once. `python -m evals run` writes what it returns to OUTPUT/NAME.json and draws OUTPUT/NAME.png;
`python -m evals report` shows the same result again.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject

Result = dict[str, Any]  # what a task measured, as JSON
Table = list[list[str]]  # the header and the rows, as they are printed

# what sparse layers can run, and its printed name
ATTENTION: Final = {"moba": "MoBA", "sliding_window": "sliding window", "full": "full attention"}

# name -> (module, what it measures)
TASKS: Final = {
    "position_loss": ("evals.position_loss", "loss of a token by its position in the document"),
    "needle": ("evals.needle", "finding a passkey hidden at some depth of a long text"),
}


class Task(Protocol):
    """The functions of a task's module. TITLE: its heading in the report."""

    TITLE: str

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        """Add the task's own options."""

    def prepare(self, subject: Subject, args: argparse.Namespace) -> Any:
        """Everything that can be refused, before any task runs; raises EvalError. Returns what `run` needs."""

    def run(self, subject: Subject, plan: Any) -> Result:
        """Measure. Returns the task's own entries of the JSON file."""

    def figure(self, result: Result) -> Figure:
        """The plot of a result."""

    def table(self, result: Result) -> Table:
        """The numbers of a result that belong in a table."""

    def caption(self, result: Result) -> str:
        """How the numbers were made, in a few plain sentences."""


def load_task(name: str) -> Task:
    """The module of a task of the table."""
    return cast(Task, importlib.import_module(TASKS[name][0]))
