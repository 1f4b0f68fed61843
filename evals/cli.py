"""What the commands of `python -m evals` share: argument parsing, one-line errors, progress bars, result files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from data_tools.cli import natural_int as natural_int
from data_tools.cli import positive_int as positive_int
from neomoba_dist.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class EvalError(UserError):
    """An evaluation that cannot be run: one line that names the flag or file and what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations whose errors are EvalError."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise EvalError(f"{message}; see {self.prog} --help")


def percent(text: str) -> float:
    """argparse type: a number from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return value


def list_of(item: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """argparse type: a comma-separated list without repetitions, in rising order."""

    def parse(text: str) -> list[Number]:
        return sorted({item(part.strip()) for part in text.split(",")})

    return parse


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print a header and rows in aligned columns: labels to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            f"{line[0]:{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))


def progress(items: Iterable[T], total: int, description: str, unit: str, *, disable: bool = False) -> tqdm[T]:
    """`items` under a progress bar with rate and remaining time; in a terminal only."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=description, unit=unit, dynamic_ncols=True, disable=disable or None)


def write_json(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write `folder`/NAME.json, whole or not at all; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", [json.dumps(result, indent=1)])


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """All lines, or no file."""
    temporary = path.with_name(path.name + ".writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    temporary.replace(path)
