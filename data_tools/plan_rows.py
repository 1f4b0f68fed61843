"""Makes the row plans of a corpus or mixture before training does: which pieces of documents share a row.

A job makes its plans by itself when it starts, all ranks together; this command makes them on a machine without GPUs.
Stopped at any point, the same command goes on with the parts that are missing; several may work on one cache. Either
--ds_config names sources, packing, lengths and cache, or flags do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.cli import command_parser, positive_int, progress, run
from neomoba_dist.config import ConfigError, DataConfig, load_config
from neomoba_dist.config.sources import source_problems
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from neomoba_dist.data.rows import Source


def make_plans(settings: DataConfig, lengths: Sequence[int], workers: int) -> None:
    """Makes what is missing of the plans of all sources at all row lengths; a line for each. DataError."""
    from neomoba_dist.data.plan import ROWS_FILE
    from neomoba_dist.data.rows import make_planner
    from neomoba_dist.data.stream import make_packing

    assert settings.cache is not None
    cache = Path(settings.cache)
    sources = _sources(settings, cache)
    for length in lengths:
        for source in sources:
            planner = make_planner(source, make_packing(settings, length))
            folder = planner.folder(cache)
            if not (folder / ROWS_FILE).is_file():
                missing = planner.missing(folder)
                with (
                    ThreadPoolExecutor(workers) as pool,  # the packing loops hold no lock of Python's
                    progress(len(missing), f"{source.corpus.name} at {length}", "part") as bar,
                ):
                    for _ in pool.map(lambda part: planner.save(folder, part), missing):  # noqa: B023 (used at once)
                        bar.update()
                planner.finish(folder)
            plan = planner.open(folder)
            padding = 1 - plan.totals[0] / (plan.rows * length) if plan.rows else 0.0
            print(
                f"{folder}: {source.corpus.name}, {plan.totals[1]} documents in {plan.rows} rows of {length} tokens, "
                f"{padding:.2%} padding",
                flush=True,
            )


def _sources(settings: DataConfig, cache: Path) -> list[Source]:
    """The sources of the mixture, and the validation corpus; every shard is looked at."""
    from neomoba_dist.data.check import open_corpus
    from neomoba_dist.data.rows import Source

    entries = [(entry.location, entry.min_length) for entry in settings.sources]
    if settings.validation is not None:
        entries.append((settings.validation, 0))
    corpora = {
        location: open_corpus(location, cache=cache) for location in dict.fromkeys(location for location, _ in entries)
    }
    return [Source(corpora[location], min_length=least) for location, least in dict.fromkeys(entries)]


def _settings(args: argparse.Namespace) -> tuple[DataConfig, list[int]]:
    """What to plan at which lengths. DataError if neither a configuration nor flags say it, or both do."""
    if args.ds_config:
        try:
            config = load_config(args.ds_config, args.set)
        except ConfigError as error:
            raise DataError(str(error)) from error
        if args.train or args.packing or args.max_documents_per_row or args.align or args.cache:
            raise DataError("--ds_config says how rows are made; change it with --set instead of flags")
        if config.data.cache is None:
            raise DataError("neomoba.data.cache is null: there is no place for a plan; set it to a folder")
        return config.data, args.sequence_length or [config.phase.sequence_length]
    if args.set:
        raise DataError("--set changes keys of --ds_config; give that, too")
    if not args.train or not args.sequence_length:
        raise DataError("nothing to plan: give --ds_config FILE, or --train and --sequence_length")
    for problem in source_problems(args.train):
        raise DataError(f"--train {problem}")
    flags = ("packing", "max_documents_per_row", "align", "cache")
    given = {flag: value for flag in flags if (value := getattr(args, flag)) is not None}
    return DataConfig(train=args.train, **given), args.sequence_length


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("plan_rows", __doc__)
    parser.add_argument("--ds_config", metavar="FILE", help="JSON of a phase: its sources, packing, length and cache")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON"
    )
    parser.add_argument("--train", metavar="SOURCES", help="folder of shards or mixture, as neomoba.data.train has it")
    parser.add_argument(
        "--sequence_length", type=positive_int, nargs="+", metavar="N", help="tokens in a row (default: the phase's)"
    )
    parser.add_argument("--packing", choices=("best_fit", "concat", "whole"), help="as neomoba.data.packing")
    parser.add_argument("--max_documents_per_row", type=positive_int, metavar="N", help="as in neomoba.data")
    parser.add_argument("--align", type=positive_int, metavar="N", help="as neomoba.data.align")
    parser.add_argument("--cache", metavar="DIR", help="as neomoba.data.cache (default: runs/cache)")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, help="parts made at a time")
    args = parser.parse(argv)
    settings, lengths = _settings(args)
    make_plans(settings, lengths, args.workers)


if __name__ == "__main__":
    run(main)
