"""Evaluate checkpoints: `python -m evals run | report | bench | ablation`.

run      run tasks on a checkpoint; writes OUTPUT/TASK.json and OUTPUT/TASK.png
report   one self-contained HTML file from run folders and evaluation results
bench    measure speed and memory
ablation train several models alike and compare them
"""

from __future__ import annotations

import importlib
import pkgutil
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evals.cli import EvalError, Parser, print_table
from evals.tasks import TASKS, load_task


def run_command(argv: Sequence[str]) -> int:
    """`python -m evals run`: load the checkpoint once, check all tasks, then run them."""
    listed = "\n".join(f"  {name:14} {what}" for name, (_, what) in TASKS.items())
    parser = Parser("python -m evals run", f"Run evaluation tasks on a checkpoint.\n\ntasks:\n{listed}")
    parser.add_argument("--tasks", required=True, type=_task_names, metavar="NAME,...", help="tasks to run")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="run folder (its newest checkpoint) or step_N folder",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of shards (default: the validation corpus of the run)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    for name in _named_tasks(argv):
        load_task(name).add_arguments(parser.add_argument_group(name))
    args = parser.parse_args(argv)

    from evals.load import load_subject
    from evals.plots import save_png
    from evals.results import header, write_result

    subject = load_subject(args.checkpoint, args.data, args.device)
    plans = {name: load_task(name).prepare(subject, args) for name in args.tasks}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(
            f"--output {args.output}: no folder can be made there ({error.strerror}); give another"
        ) from error
    command = shlex.join(["python", "-m", "evals", "run", *argv])
    for name, plan in plans.items():
        task, began = load_task(name), time.monotonic()
        measured = task.run(subject, plan)
        result = {**header(subject, name, command, time.monotonic() - began), **measured}
        path = write_result(args.output, result)
        save_png(task.figure(result), path.with_suffix(".png"))
        print_table(task.table(result))
        print(f"{name}: {path}, {path.with_suffix('.png')}")
    return 0


def report_command(argv: Sequence[str]) -> int:
    """`python -m evals report`."""
    parser = Parser("python -m evals report", "Write one self-contained HTML file.")
    parser.add_argument(
        "--run",
        required=True,
        type=Path,
        nargs="+",
        metavar="DIR",
        help="run folders of training, in the order of phases",
    )
    parser.add_argument(
        "--eval", type=Path, nargs="+", default=[], metavar="DIR", help="--output folders of `python -m evals run`"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file to write")
    args = parser.parse_args(argv)

    from evals.report import write_report

    return write_report(args)


def bench_command(argv: Sequence[str]) -> int:
    """`python -m evals bench NAME`: the module evals.bench.NAME with `add_arguments(parser)` and `run(args) -> int`."""
    names = _bench_names()
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m evals bench NAME ...\n\nNAME: {', '.join(names) or 'none in this version'}")
        return 0
    if argv[0] not in names:
        raise EvalError(
            f"bench {argv[0]}: no such benchmark; choose from: {', '.join(names) or 'none in this version'}"
        )
    module = importlib.import_module(f"evals.bench.{argv[0]}")
    parser = Parser(f"python -m evals bench {argv[0]}", module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv[1:])))


def ablation_command(argv: Sequence[str]) -> int:
    """`python -m evals ablation NAME`: several models trained alike and compared."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m evals ablation NAME ...\n\nNAME: {', '.join(ABLATIONS)}")
        return 0
    if argv[0] not in ABLATIONS:
        raise EvalError(f"ablation {argv[0]}: no such comparison; choose from: {', '.join(ABLATIONS)}")
    module = importlib.import_module(ABLATIONS[argv[0]])
    parser = Parser(f"python -m evals ablation {argv[0]}", module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv[1:])))


ABLATIONS = {"three_way": "evals.three_way"}
COMMANDS = {"run": run_command, "report": report_command, "bench": bench_command, "ablation": ablation_command}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 after one line on what is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m evals {{{','.join(COMMANDS)}}} ...\n\n{__doc__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise EvalError(f"{argv[0]}: no such command; choose from: {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is the whole story for the person at the keyboard."""
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.config import ConfigError
    from neomoba_dist.data.errors import DataError

    return EvalError, ConfigError, DataError, CheckpointError, OSError


def _task_names(text: str) -> list[str]:
    """The value of --tasks. Raises EvalError."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in TASKS:
            raise EvalError(f"--tasks {name!r}: no such task; choose from: {', '.join(TASKS)}")
    return names


def _named_tasks(argv: Sequence[str]) -> list[str]:
    """The tasks whose options this command line may use: those of --tasks, all where it is missing (for --help)."""
    scout = Parser("python -m evals run", None)
    scout.add_argument("--tasks", type=_task_names)
    words = [word for word in argv if word not in ("-h", "--help")]
    return scout.parse_known_args(words)[0].tasks or list(TASKS)


def _bench_names() -> list[str]:
    """The public modules of evals.bench, none of which is imported."""
    folder = Path(__file__).parent / "bench"
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in names if not name.startswith("_"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
