"""Context parallelism: bytes received, memory and balance, by formula for large worlds and counted on this machine.

The first table needs no ranks. The second, with --measure, trains one MoBA and one full layer (hidden size 256) on one
long document over 1, 2 and 4 CPU ranks and compares what the ledger counted with the formulas; it takes minutes, most
of them for the full layer at the longest length. --output gets context.json and context.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import list_of, positive_int, print_table, progress, write_json
from neomoba_dist.errors import FailedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neomoba_dist.parallel.context_cost import AttentionShape

ROOT = Path(__file__).resolve().parents[2]
WORLDS = ((32768, 8), (131072, 8), (131072, 64), (1 << 20, 8), (1 << 20, 64))
SHAPES = {"phase 3 (12/4 heads x 64)": (12, 4, 64), "32/8 heads x 128": (32, 8, 128)}
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench context`."""
    parser.add_argument("--measure", action="store_true", help="also run ranks on this machine")
    parser.add_argument(
        "--tokens", type=list_of(positive_int), default=[16384, 32768, 65536, 131072], metavar="N,...",
        help="of --measure (default: 16384,32768,65536,131072)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=list_of(positive_int), default=[1, 2, 4], metavar="N,...", help="of --measure (default: 1,2,4)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for context.json and context.png")


def predict(tokens: int, ranks: int, shape: AttentionShape) -> list[dict[str, Any]]:
    """What one MoBA and one full layer cost a rank, with the strategies that "auto" takes and the default split."""
    from neomoba_dist.parallel import context_cost
    from neomoba_dist.parallel.context_split import ContextSplit

    split = ContextSplit.of_tokens(tokens, ranks, "block_cyclic", shape.block_size)
    rows = []
    for kind in ("moba", "full"):
        strategy = context_cost.choose(kind, shape, split.local_tokens, ranks)
        forward, backward = context_cost.received_bytes(strategy, shape, split.local_tokens, ranks)
        rows.append(
            {
                "tokens": tokens,
                "ranks": ranks,
                "kind": kind,
                "strategy": strategy,
                "forward": forward,
                "backward": backward,
                "gathered": sum(context_cost.received_bytes("allgather_kv", shape, split.local_tokens, ranks)),
                "kept": context_cost.kept_bytes(strategy, shape, split.local_tokens, ranks),
                "passing": context_cost.passing_bytes(strategy, shape, split.local_tokens, ranks),
                "imbalance": context_cost.work_imbalance(kind, strategy, split, shape, causal=True),
            }
        )
    return rows


def measure(tokens: int, ranks: int) -> dict[str, Any]:
    """One forward and backward pass on `ranks` processes: the largest peak, the bytes, and what was predicted."""
    from evals.bench._context_rank import MODEL
    from neomoba_dist.parallel.context_cost import AttentionShape

    assert MODEL.head_dim is not None
    heads = (MODEL.num_attention_heads, MODEL.num_key_value_heads)
    shape = AttentionShape(*heads, MODEL.head_dim, 4, MODEL.moba_block_size, MODEL.moba_top_k)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "evals.bench._context_rank", str(tokens), folder]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if process.returncode:
            raise FailedError(f"bench context: {ranks} ranks failed at {tokens} tokens: {process.stderr[-2000:]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    predicted = 0.0 if ranks == 1 else sum(row["forward"] + row["backward"] for row in predict(tokens, ranks, shape))
    worst = {key: max(rank[key] for rank in found) for key in found[0]}
    return {"tokens": tokens, "ranks": ranks, "predicted": predicted, **worst}


def run(args: argparse.Namespace) -> int:
    """Print the tables; write JSON and the plot."""
    from neomoba_dist.parallel.context_cost import AttentionShape

    results: dict[str, Any] = {"formulas": {}, "measured": []}
    for name, (query_heads, kv_heads, head_dim) in SHAPES.items():
        shape = AttentionShape(query_heads, kv_heads, head_dim, 2, 512, 3)
        rows = [row for world in WORLDS for row in predict(*world, shape)]
        results["formulas"][name] = rows
        print(f"\n{name}, bfloat16, block 512, top-k 3, causal: MiB per rank and layer")
        heads = [
            "tokens",
            "cp",
            "layer",
            "strategy",
            "forward",
            "backward",
            "KV gather",
            "kept",
            "passing",
            "imbalance",
        ]
        print_table([heads, *(_formula_cells(row) for row in rows)])
    if args.measure:
        cases = [(tokens, ranks) for tokens in sorted(args.tokens) for ranks in args.ranks]
        results["measured"] = [measure(*case) for case in progress(cases, len(cases), "context", "run")]
        print("\none MoBA + one full layer, hidden size 256, float32, on this machine")
        heads = ["tokens", "cp", "peak MiB", "peak x cp / tokens, KiB", "received MiB", "predicted MiB", "seconds"]
        print_table([heads, *(_measured_cells(row) for row in results["measured"])])
    if args.output:
        write_json(args.output, "context", results)
        if args.measure:
            from evals.plots import save_png

            save_png(figure(results["measured"]), args.output / "context.png")
    return 0


def _formula_cells(row: dict[str, Any]) -> list[str]:
    sizes = [f"{row[key] / MIB:,.1f}" for key in ("forward", "backward", "gathered", "kept", "passing")]
    return [str(row["tokens"]), str(row["ranks"]), row["kind"], row["strategy"], *sizes, f"{row['imbalance']:.2f}"]


def _measured_cells(row: dict[str, Any]) -> list[str]:
    each = row["peak"] * row["ranks"] / row["tokens"] / 1024
    sizes = [f"{row[key] / MIB:,.1f}" for key in ("received", "predicted")]
    peak = f"{row['peak'] / MIB:,.0f}"
    return [str(row["tokens"]), str(row["ranks"]), peak, f"{each:.1f}", *sizes, f"{row['seconds']:.0f}"]


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Peak memory of a rank against the length, a line per number of ranks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from evals.plots import BLUE, INK, ORANGE, style

    lengths = sorted({row["tokens"] for row in rows})
    with style():
        drawn = Figure(figsize=(4.8, 3.2), layout="constrained")
        axes = drawn.subplots()
        for ranks, colour in zip(sorted({row["ranks"] for row in rows}), (ORANGE, BLUE, INK), strict=False):
            points = [(row["tokens"], row["peak"] / 2**30) for row in rows if row["ranks"] == ranks]
            label = f"{ranks} rank{'s' * (ranks > 1)}"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title="Peak memory of a rank, GiB")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:.0f}k"))
        axes.yaxis.set_major_locator(LogLocator(base=2))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
        axes.legend()
    return drawn
