"""`python -m evals check-data`: which files of a user are there, whether they can be read, which tasks need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evals.cli import EvalError, print_table
from evals.ruler.material import Material
from evals.ruler.request import find_files

NEEDED_BY = {
    "essays": "niah_single_2, _3, niah_multikey_1, niah_multivalue, niah_multiquery",
    "squad": "qa_1",
    "hotpotqa": "qa_2",
    "english_words": "cwe with more than 8,166 words",
}


def command(folder: Path) -> int:
    """Prints a table; 1 where a file is there and cannot be used."""
    if not folder.is_dir():
        raise EvalError(f"{folder}: no such folder; name the one that you give to --data-dir")
    material = Material(find_files(folder), most_words=1_000_000)
    contents: dict[str, Callable[[], str]] = {
        "essays": lambda: f"{material.essays.ends[-1]:,} words",
        "squad": lambda: f"{len(material.squad.questions):,} questions",
        "hotpotqa": lambda: f"{len(material.hotpotqa.questions):,} questions",
        "english_words": lambda: f"{len(material.english_words):,} words",
    }
    lines, problems = [["data", "file", "content", "needed by"]], []
    for name, content in contents.items():
        path = material.paths[name]
        found = "-"
        if path is not None:
            try:
                found = content()
            except EvalError as error:
                found = "cannot be used"
                problems.append(str(error))
        lines.append([name, str(path or "missing"), found, NEEDED_BY[name]])
    print_table(lines)
    if problems:
        raise EvalError("; ".join(problems))
    return 0
