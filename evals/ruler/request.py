"""What to prepare: the options of `prepare ruler` and of `run --tasks ruler`, checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evals.cli import EvalError, list_of, natural_int, positive_int
from evals.ruler.material import FILES
from evals.ruler.sets import DEFAULT_SAMPLES, DEFAULT_SEED

if TYPE_CHECKING:
    from neomoba_dist.data.tokenizer import Tokenizer


def find_files(folder: Path) -> dict[str, Path | None]:
    """What --data-dir holds of the files of material.FILES, under which of their names."""
    found = {name: [folder / each for each in names if (folder / each).exists()] for name, names in FILES.items()}
    return {name: paths[0] if paths else None for name, paths in found.items()}


@dataclass(frozen=True)
class Request:
    """What to prepare. samples: of each set, fewer where there are not as many questions. paths: see material.FILES."""

    folder: Path
    tokenizer: Tokenizer
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int
    fit: str
    ruler_root: Path | None
    paths: dict[str, Path | None]

    @classmethod
    def of(cls, args: argparse.Namespace, folder: Path, tokenizer: Tokenizer, tasks: Sequence[str]) -> Request:
        """From the options of `add_arguments`. Raises EvalError."""
        if not args.lengths:
            raise EvalError("--lengths is missing; give the lengths of RULER in tokens, for example 4096,8192")
        if args.fit == "nvidia" and args.ruler_root is None:
            raise EvalError("--fit nvidia runs RULER's own scripts; name a checkout of RULER with --ruler-root")
        named = {name: getattr(args, name, None) for name in FILES}
        there = find_files(args.data_dir) if args.data_dir else {}
        paths = {name: path or there.get(name) for name, path in named.items()}
        samples = args.samples or DEFAULT_SAMPLES
        seed = DEFAULT_SEED if args.seed is None else args.seed
        return cls(folder, tokenizer, tasks, args.lengths, samples, seed, args.fit, args.ruler_root, paths)


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What decides the content of the samples, but for lengths, samples, seed and --data-dir."""
    parser.add_argument("--essays", type=Path, metavar="DIR", help="haystack: a folder of .txt files, or RULER's JSON")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="questions of qa_1, in SQuAD's format")
    parser.add_argument("--hotpotqa", type=Path, metavar="FILE", help="questions of qa_2, in HotpotQA's format")
    parser.add_argument(
        "--fit", choices=("exact", "nvidia"), default="exact",
        help="exact: every sample fills its length; nvidia: RULER's own scripts, byte for byte (default: exact)",
    )  # fmt: skip
    parser.add_argument("--ruler-root", type=Path, metavar="DIR", help="a checkout of github.com/NVIDIA/RULER")


def add_command_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of `python -m evals prepare ruler`."""
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="of the model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the samples")
    parser.add_argument("--lengths", required=True, type=list_of(positive_int), metavar="N,...", help="in tokens")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...", help="default: all 13 tasks")
    parser.add_argument(
        "--samples", type=positive_int, metavar="N", help=f"of each task and length (default: {DEFAULT_SAMPLES})"
    )
    parser.add_argument("--seed", type=natural_int, metavar="N", help=f"default: {DEFAULT_SEED}")
    held = ", ".join(names[0] for names in FILES.values())
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help=f"may hold {held}")
    add_arguments(parser)
