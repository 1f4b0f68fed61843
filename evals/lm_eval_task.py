"""The task `lm_eval`: any task of lm-evaluation-harness, `--tasks lm_eval:NAME`, on a sharded checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table

TITLE = "Tasks of lm-evaluation-harness"
KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
BOOTSTRAP = 1000  # resamples, for metrics whose error has no formula


@dataclass(frozen=True)
class Plan:
    """manager: knows the tasks. shots: None: each task's own."""

    names: list[str]
    manager: Any
    shots: int | None
    limit: int | None


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    from evals.cli import natural_int

    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="lm_eval: a folder of task YAML files of yours"
    )
    parser.add_argument("--num-fewshot", type=natural_int, metavar="N", help="lm_eval: examples before each question")


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Find the tasks. Raises EvalError."""
    names = args.tasks["lm_eval"]
    if not names:
        raise EvalError("--tasks lm_eval: name tasks of lm-evaluation-harness, for example lm_eval:lambada_openai")
    if not subject.config.model.causal:
        raise EvalError(
            "lm_eval: its tasks are for causal models, and this checkpoint is a masked language model; fine-tune it "
            "with launch/finetune.py, or evaluate it with needle"
        )
    if args.include_path is not None and not args.include_path.is_dir():
        raise EvalError(f"--include-path {args.include_path}: no such folder")
    try:
        import lm_eval.models  # noqa: F401  before any model is registered, else the built-in ones are lost
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvalError(
            f"lm_eval: the package lm-eval cannot be imported ({error}); install the requirements"
        ) from error
    path = None if args.include_path is None else str(args.include_path)
    manager = TaskManager(include_path=path, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):  # lm-eval's own are 14,000, read in seconds
        manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            raise EvalError(f"--tasks lm_eval:{name}: lm-eval has no such task; list them with: lm-eval ls tasks")
    return Plan(names, manager, args.num_fewshot, args.limit)


def run(subject: Subject, plan: Plan) -> Result:
    """The results of lm-eval, in its own form."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from evals.lm_eval_model import ShardedLM
    from neomoba_dist.parallel.comm import all_gather_objects

    attention = subject.attentions[0]
    subject.model.use(attention)
    # ranks whose LOCAL_RANK is not 0 get None; samples stay on rank 0
    found = simple_evaluate(
        ShardedLM(subject),
        tasks=plan.names,
        num_fewshot=plan.shots,
        limit=plan.limit,
        task_manager=plan.manager,
        bootstrap_iters=BOOTSTRAP,
    )
    samples = [{"task": name, **sample} for name, lines in (found or {}).get("samples", {}).items() for sample in lines]
    kept = {key: found[key] for key in KEPT if key in found} if found else {}
    kept = all_gather_objects(plain(kept, handle_non_serializable), subject.workers.mesh, "world")[0]
    return {
        "prefill": attention,
        "decode": subject.model.decode,
        **kept,
        "sample_lines": plain(samples, handle_non_serializable),
    }


def plain(value: Any, default: Any) -> Any:
    """As JSON: functions and arrays of lm-eval's settings become texts and numbers."""
    import json

    return json.loads(json.dumps(value, default=default))


def scores(result: Result) -> Scores:
    """As lm-eval has them."""
    return {
        name: {
            **{key: value for key, value in entry.items() if "," in key and isinstance(value, (int, float))},
            "samples": result["n-samples"].get(name, {}).get("effective"),
        }
        for name, entry in result["results"].items()
    }


def lines(result: Result) -> list[tuple[str, str, str, float, float | None]]:
    """(task, metric, filter, value, standard error) of every score."""
    found = []
    for name, entry in result["results"].items():
        for key, value in entry.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                error = entry.get(f"{metric}_stderr,{kind}")
                found.append((name, metric, kind, value, error if isinstance(error, (int, float)) else None))
    return found


def csv(result: Result) -> Table:
    """One line per task and metric."""
    return [["task", "metric", "filter", "value", "stderr"]] + [
        [name, metric, kind, str(value), "" if error is None else str(error)]
        for name, metric, kind, value, error in lines(result)
    ]


def figure(result: Result) -> Figure:
    """The scores as bars."""
    from evals.plots import bar_figure

    return bar_figure([(f"{name}, {metric}", value, error) for name, metric, _, value, error in lines(result)])


def compare(results: dict[str, Result]) -> tuple[Figure, Table]:
    """The scores of several checkpoints: a table of all, bars of the last."""
    found = {name: {entry[:3]: entry[3] for entry in lines(result)} for name, result in results.items()}
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    rows = [
        [", ".join(key), *(f"{values[key]:.4f}" if key in values else "-" for values in found.values())] for key in keys
    ]
    return figure(list(results.values())[-1]), [["task, metric, filter", *found], *rows]


def table(result: Result) -> Table:
    """One line per task and metric."""
    return [["task, metric", "value", "standard error", "better"]] + [
        [f"{name}, {metric}", f"{value:.4f}", "-" if error is None else f"{error:.4f}", better(result, name, metric)]
        for name, metric, _, value, error in lines(result)
    ]


def better(result: Result, name: str, metric: str) -> str:
    """Which way is better."""
    higher = result["higher_is_better"].get(name, {}).get(metric)
    return "-" if higher is None else "higher" if higher else "lower"


def caption(result: Result) -> str:
    """How the scores were made."""
    counts = [f"{name} {entry['effective']:,}" for name, entry in result["n-samples"].items()]
    return (
        f"Scores of lm-evaluation-harness; whiskers: standard error. Questions: {', '.join(counts)}. Attention: "
        f"{result['prefill']} over prompts, {result['decode']} for answers."
    )
