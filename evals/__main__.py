"""Evaluate checkpoints: `python -m evals prepare | run | score | report | bench | ablation | check-data`.

prepare  write the data of a task once
run      run tasks on a checkpoint; writes OUTPUT/TASK.json and OUTPUT/TASK.png
score    score predictions again
report   one self-contained HTML file from run folders and evaluation results
bench    measure speed and memory
ablation train several models alike and compare them
check-data  look at a folder of data files
"""

from __future__ import annotations

import importlib
import pkgutil
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from evals.cli import EvalError, Parser, list_of, natural_int, positive_int
from evals.tasks import TASKS, load_task
from neomoba_dist.errors import exit_code_of


def run_command(argv: Sequence[str]) -> int:
    """`python -m evals run`: load the checkpoint once, check all tasks, then run them."""
    listed = "\n".join(f"  {name:14} {what}" for name, (_, what, *_) in TASKS.items())
    parser = Parser("python -m evals run", f"Run evaluation tasks on a checkpoint.\n\ntasks:\n{listed}")
    parser.add_argument(
        "--tasks", required=True, type=_tasks, metavar="NAME[:PART],...", help="tasks to run, whole or in part"
    )
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
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one beside the corpus")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        parser.add_argument(f"--{axis}", type=positive_int, default=1, metavar="N", help=f"{what}-parallel ranks")
    parser.add_argument(
        "--attn-prefill", choices=("moba", "full"),
        help="attention of MoBA layers over texts and prompts (default: moba; needle, position_loss: both, compared)",
    )  # fmt: skip
    parser.add_argument(
        "--attn-decode", choices=("moba", "full"), default="full",
        help="attention of MoBA layers for tokens after a prompt (default: full, as in the paper)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-tokens", type=positive_int, default=4096, metavar="N",
        help="most tokens of one forward; changes no score (default: 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=list_of(positive_int), metavar="N,...",
        help="ruler, needle, efficiency: lengths in tokens (default but for ruler: up to the run's sequence_length)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=positive_int, metavar="N",
        help="ruler: of each task and length (default: 500); needle: texts per length, each at all depths (default: 8)",
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="local data files of the tasks")
    parser.add_argument("--seed", type=natural_int, metavar="N", help="ruler (default: 42), needle (default: 0)")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N samples of each set; marks the result PARTIAL"
    )
    for name in _named_tasks(argv):
        load_task(name).add_arguments(parser.add_argument_group(name))
    args = parser.parse_args(argv)
    _join_world()
    from evals.run import run

    return run(args, shlex.join(["python", "-m", "evals", "run", *argv]))


def prepare_command(argv: Sequence[str]) -> int:
    """`python -m evals prepare NAME`: the data of a task, once, for all runs."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m evals prepare NAME ...\n\nNAME: ruler")
        return 0
    if argv[0] != "ruler":
        raise EvalError(f"prepare {argv[0]}: nothing is prepared for it; choose from: ruler")
    from evals.ruler import prepare, request

    parser = Parser("python -m evals prepare ruler", prepare.__doc__)
    request.add_command_arguments(parser)
    return prepare.command(parser.parse_args(argv[1:]))


def score_command(argv: Sequence[str]) -> int:
    """`python -m evals score`: RULER's scores of predictions in its own format, ours or another system's."""
    parser = Parser("python -m evals score", "Score the predictions of RULER again.")
    parser.add_argument("output", type=Path, metavar="DIR", help="--output of a run, or a folder of LENGTH/TASK.jsonl")
    args = parser.parse_args(argv)
    from evals.ruler.score import command

    return command(args.output)


def check_data_command(argv: Sequence[str]) -> int:
    """`python -m evals check-data`."""
    parser = Parser("python -m evals check-data", "Which data files of RULER are there, and whether they can be read.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="as given to --data-dir")
    args = parser.parse_args(argv)
    from evals.ruler.check import command

    return command(args.folder)


def _join_world() -> None:
    """Meet the other ranks of the launch, if there are any."""
    import logging

    from neomoba_dist.parallel.launcher import join_world, joined_rank

    join_world()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("evals").setLevel(logging.INFO if joined_rank() == 0 else logging.ERROR)


def report_command(argv: Sequence[str]) -> int:
    """`python -m evals report`."""
    parser = Parser("python -m evals report", "Write one self-contained HTML file.")
    parser.add_argument(
        "--run",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="run folders of training, in the order of phases",
    )
    parser.add_argument(
        "--eval", type=Path, nargs="+", default=[], metavar="DIR", help="--output folders of `python -m evals run`"
    )
    parser.add_argument(
        "--ablation", type=Path, nargs="+", default=[], metavar="DIR", help="--output folders of `evals ablation`"
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
    from evals import ablation

    parser = Parser("python -m evals ablation", ablation.__doc__)
    ablation.add_arguments(parser)
    return ablation.run(parser.parse_args(argv))


COMMANDS = {
    "prepare": prepare_command,
    "run": run_command,
    "score": score_command,
    "report": report_command,
    "bench": bench_command,
    "ablation": ablation_command,
    "check-data": check_data_command,
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m evals {{{','.join(COMMANDS)}}} ...\n\n{__doc__}")
        return 0
    return exit_code_of(lambda: command(argv))


def command(argv: Sequence[str]) -> int:
    """What the first word names. Raises EvalError where nothing has that name."""
    if argv[0] not in COMMANDS:
        raise EvalError(f"{argv[0]}: no such command; choose from: {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


def names_after(words: Sequence[str]) -> Collection[str] | None:
    """For completion: what may follow some words; None where they name a command, whose flags follow."""
    named = {"bench": _bench_names(), "prepare": ["ruler"]}
    return COMMANDS if not words else named.get(words[0]) if len(words) == 1 else None


def _tasks(text: str) -> dict[str, list[str]]:
    """The value of --tasks: name -> parts, none for the whole task. Raises EvalError."""
    found: dict[str, list[str]] = {}
    for word in text.split(","):
        name, _, part = word.strip().partition(":")
        if name not in TASKS:
            raise EvalError(f"--tasks {name!r}: no such task; choose from: {', '.join(TASKS)}")
        if part and not TASKS[name].parts:
            raise EvalError(f"--tasks {name}:{part}: {name} has no parts; give --tasks {name}")
        parts = found.setdefault(name, [])
        if part and part not in parts:
            parts.append(part)
    return found


def _named_tasks(argv: Sequence[str]) -> list[str]:
    """The tasks whose options this command line may use: those of --tasks, all where it is missing (for --help)."""
    scout = Parser("python -m evals run", None)
    scout.add_argument("--tasks", type=_tasks)
    words = [word for word in argv if word not in ("-h", "--help")]
    return list(scout.parse_known_args(words)[0].tasks or TASKS)


def _bench_names() -> list[str]:
    """The public modules of evals.bench, none of which is imported."""
    folder = Path(__file__).parent / "bench"
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in names if not name.startswith("_"))


if __name__ == "__main__":
    from launch.pretrain import leave

    leave(main(sys.argv[1:]))
