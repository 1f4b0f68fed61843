"""Checkpoints: memory, speed and pause of a save, speed of a load, against torch.save and plain reading.

So many processes hold what ZeRO-1 gives a rank of so many data-parallel ones and save it together: while they wait,
and from a copy beside matrix products that stand for a step. "save MiB" and "async MiB": memory that a save takes above
what the process held. "pause": what the step stands still for; "delay": how much later it ends, which on a CPU is what
copy and thread take from the cores. torch.save writes the same bytes from as many processes and flushes them to disk
as well; reading takes each process's files into memory that is there already, as a load does, which also holds every
file against its checksum. Before anything is read the files leave the page cache. Rivals take turns, the least of the
repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from evals.bench._processor import processor_name
from evals.cli import list_of, positive_int, print_table, write_json

MIB = 2**20
HEADER = (
    "dp", "MB/rank", "save MiB", "async MiB", "bytes/parameter", "save GB/s", "x torch.save", "pause s", "of a save",
    "delay s", "load GB/s", "x time of reading",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench checkpoint`."""
    parser.add_argument(
        "--ranks", type=list_of(positive_int), default=[1, 2, 4, 8], metavar="N,...", help="default: 1,2,4,8"
    )
    parser.add_argument("--layers", type=positive_int, default=20, metavar="N", help="of 3.1M parameters (default: 20)")
    parser.add_argument(
        "--repetitions", type=positive_int, default=5, metavar="N", help="the least counts (default: 5)"
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="on which disk (default: the temporary folder)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for checkpoint.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from torch import multiprocessing

    from evals.bench import _checkpoint_rank

    rows = []
    for world in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            multiprocessing.start_processes(
                _checkpoint_rank.main, (world, folder, args.layers, args.repetitions), world, start_method="fork"
            )
            rows.append(json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")))
    print_table([HEADER, *map(_cells, rows)])
    print(processor_name(), file=sys.stderr)  # the table alone is the output
    if args.output is not None:
        command = shlex.join(["python", "-m", "evals", "bench", "checkpoint", *sys.argv[3:]])
        result = {"command": command, "machine": processor_name(), "rows": rows}
        write_json(args.output, "checkpoint", result)
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    seconds, total = row["seconds"], row["bytes"]
    return (
        str(row["ranks"]),
        f"{row['share'] / 1e6:.0f}",
        f"{row['peak']['save'] / MIB:.1f}",
        f"share{(row['peak']['async'] - row['share']) / MIB:+.1f}",
        f"{total / row['parameters']:.3f}",
        f"{total / seconds['save'] / 1e9:.2f}",
        f"{seconds['torch.save'] / seconds['save']:.2f}",
        f"{seconds['pause']:.3f}",
        f"{seconds['pause'] / seconds['save']:.1%}",
        f"{seconds['save and step'] - seconds['step']:.3f}",
        f"{total / seconds['load'] / 1e9:.2f}",
        f"{seconds['load'] / seconds['read']:.2f}",
    )
