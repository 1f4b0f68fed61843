"""What the commands share: argument parsing, one-line errors, progress bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from neomoba_dist.config.paths import folder_problem
from neomoba_dist.data.errors import DataError
from neomoba_dist.errors import exit_code_of

if TYPE_CHECKING:
    from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose flags accept `-` and `_` alike and whose errors are DataError: one line, exit code 2."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses `argv`, the arguments after the command's name."""
        spelt = []
        for argument in argv:
            flag, equals, value = argument.partition("=")
            spelt.append(
                flag.replace("-", "_").replace("__", "--", 1) + equals + value if flag[:2] == "--" else argument
            )
        return self.parse_args(spelt)

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see {self.prog} --help")


def command_parser(command: str, doc: str | None) -> Parser:
    """The parser of `python -m data_tools.COMMAND`; `doc` is the module's docstring."""
    return Parser(
        prog=f"python -m data_tools.{command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_strict(parser: argparse.ArgumentParser) -> None:
    """The flag of all commands that read text: CleaningReport.strict."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at invalid UTF-8 and at records without text instead of replacing and leaving out",
    )


def run(main: Callable[[Sequence[str]], None], *, resumes: bool = False) -> NoReturn:
    """Runs a command on the program's arguments; bad input ends it with one line and exit code 2.

    resumes: what a run that is interrupted tells of the next one.
    """
    what_follows = "goes on where it stopped" if resumes else "begins again"
    sys.exit(exit_code_of(lambda: main(sys.argv[1:]), f"interrupted: the same command {what_follows}"))


def progress(total: int | None, description: str, unit: str) -> tqdm[Any]:
    """A progress bar, in a terminal only: call `update(n)`, use it as a context manager."""
    from tqdm import tqdm

    settings: dict[str, Any] = {"unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5, "disable": None}
    return tqdm(total=total, desc=description, unit=unit, **settings)


def check_output(folder: Path) -> None:
    """DataError if nothing can be written into a folder: said before the work, not after it."""
    if problem := folder_problem(folder):
        raise DataError(f"--output {folder}: {problem}; give another folder")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
