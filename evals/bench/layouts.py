"""Training steps on two ranks of this machine against one: what tp 2, dp 2 and pp 2 move, and what they cost.

Each layout trains the same updates by `bench train_step` under torchrun, one after the other, --rounds times; the least
counts. `of two` is its speed over twice that of one rank: 1 would be two ranks without any overhead, on two free cores.
Bytes are those that a rank receives in an update, as the planner counts them (docs/planner.md). Writes layouts.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evals.bench._processor import processor_name
from evals.cli import EvalError, positive_int, print_table, progress, write_json

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, and keys of the JSON
    "one rank": (1, ()),
    "tp 2": (2, ("neomoba.parallel.tensor_model_parallel_size=2",)),
    "dp 2": (2, ()),
    "pp 2": (2, ("neomoba.parallel.pipeline_model_parallel_size=2",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench layouts`."""
    parser.add_argument("--ds-config", required=True, type=Path, metavar="FILE", help="JSON of a phase")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON"
    )
    parser.add_argument("--micro-batches", type=positive_int, default=8, metavar="N", help="of one update (default: 8)")
    parser.add_argument("--steps", type=positive_int, default=3, metavar="N", help="timed updates (default: 3)")
    parser.add_argument("--rounds", type=positive_int, default=2, metavar="N", help="of all layouts (default: 2)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for layouts.json")


def received(args: argparse.Namespace, ranks: int, keys: tuple[str, ...]) -> dict[str, float]:
    """Bytes by axis. Raises ConfigError where the layout cannot run."""
    from neomoba_dist.config import load_config
    from neomoba_dist.train.planner import Planner
    from neomoba_dist.train.step_plan import Machine

    config = load_config(args.ds_config, [*args.set, *keys])
    tokens = args.micro_batches * config.micro_batch_size * config.phase.sequence_length
    config = load_config(args.ds_config, [*args.set, *keys, f"neomoba.phase.tokens_per_update={tokens}"])
    planner = Planner(ranks, Machine(), "cpu")
    moved = planner.layout(planner.with_recompute(config, math.inf)).step.received  # what is timed here fits
    return {axis: number for axis, number in moved.items() if number}


def measure(args: argparse.Namespace, ranks: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """The row of `bench train_step`. Raises EvalError with the end of what failing ranks said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "evals", "bench", "train_step", "--ds-config", str(args.ds_config.resolve())]
        command += ["--micro-batches", str(args.micro_batches), "--steps", str(args.steps), "--output", folder]
        command += ["--set", *args.set, *keys] if args.set or keys else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EvalError(f"bench layouts: {ranks} ranks, {' '.join(keys)}: {done.stderr[-2000:]}")
        (file,) = Path(folder).glob("*.json")
        return json.loads(file.read_text(encoding="utf-8"))["rows"][0]


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    moved = {name: received(args, ranks, keys) for name, (ranks, keys) in LAYOUTS.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    todo = [name for _ in range(args.rounds) for name in LAYOUTS]
    for name in progress(todo, len(todo), "layouts", "run"):
        rows[name].append(measure(args, *LAYOUTS[name]))
    best = {name: max(row["tokens_per_second"] for row in found) for name, found in rows.items()}
    alone = best["one rank"]
    result = [
        {
            "layout": name,
            "ranks": ranks,
            "tokens_per_second": best[name],
            "of_ranks": best[name] / (ranks * alone),
            "received": moved[name],
            "loss": rows[name][0]["loss"],
        }
        for name, (ranks, _) in LAYOUTS.items()
    ]
    lines = [["layout", "tokens/s", "of one", "of two", "MB received per update", "loss"]]
    for row in result:
        parts = ", ".join(f"{axis} {number / 1e6:.2f}" for axis, number in row["received"].items()) or "-"
        speed = [f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / alone:.2f}"]
        share = f"{row['of_ranks']:.2f}" if row["ranks"] > 1 else "-"
        lines.append([row["layout"], *speed, share, parts, f"{row['loss']:.5f}"])
    print_table(lines)
    print(processor_name())
    if args.output is not None:
        write_json(args.output, "layouts", {"command": sys.argv, "machine": processor_name(), "rows": result})
    return 0
