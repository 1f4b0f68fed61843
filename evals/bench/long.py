"""Memory of evaluating one very long text over context-parallel ranks of this machine: needle and loss by position.

Starts `python -m evals run` on --ranks processes with --cp as many, MoBA in prefill, and adds up what they hold, four
times a second. Pages of libraries that the processes share count once for each of them. --output gets long.json.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from evals.bench._processor import processor_name
from evals.cli import positive_int, write_json
from neomoba_dist.errors import FailedError

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
INTERVAL = 0.25  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench long`."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run folder or step_N folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards with a document of --length tokens")
    parser.add_argument("--length", type=positive_int, default=131072, metavar="N", help="tokens (default: 131072)")
    parser.add_argument("--ranks", type=positive_int, default=4, metavar="N", help="processes (default: 4)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for long.json and results")


def run(args: argparse.Namespace) -> int:
    """Run, watch, print. Raises FailedError where the evaluation fails."""
    length = str(args.length)
    words = ["-m", "evals", "run", "--tasks", "needle,position_loss", "--checkpoint", str(args.checkpoint)]
    words += ["--lengths", length, "--samples", "1", "--depths", "50", "--length", length, "--rule", "complete"]
    words += ["--rows", "1", "--attn-prefill", "moba", "--cp", str(args.ranks), "--output", str(args.output)]
    words += ["--data", str(args.data)] if args.data else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *launcher, *words], cwd=ROOT)
    peak = watch(process)
    if process.returncode:
        raise FailedError("bench long: the evaluation failed; its message is above")
    result = {
        "command": shlex.join(["python", "-m", "evals", "bench", "long", *sys.argv[3:]]),
        "machine": processor_name(),
        "length": args.length,
        "ranks": args.ranks,
        "peak_bytes": sum(peak),
        "peak_bytes_by_rank": peak,
        "seconds": time.monotonic() - began,
    }
    write_json(args.output, "long", result)
    each = ", ".join(f"{size / GIB:.2f}" for size in peak)
    print(f"{args.length:,} tokens on {args.ranks} ranks: at most {sum(peak) / GIB:.2f} GiB together ({each})")
    return 0


def watch(process: subprocess.Popen[bytes]) -> list[int]:
    """Resident bytes of each child of the launcher when all together held the most. Returns once it has ended."""
    import psutil

    most: list[int] = [0]
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            held = [child.memory_info().rss for child in parent.children()]
        except psutil.NoSuchProcess:  # it has ended meanwhile
            held = []
        most = max(most, held, key=sum)
        time.sleep(INTERVAL)
    return most
