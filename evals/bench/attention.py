"""Speed and memory of MoBA against full attention on the same tensors: torch's, on a GPU flash-attn's too.

Prints a table with the fastest rival, and the time of each, among them fla's MoBA where it is installed; --output also
gets attention.json and attention.png. On a CPU with one thread, seconds are CPU time of the process; full / moba ratios
come from one run. The limit is the ratio of the numbers of (query, key) pairs, the gate counted as half a pair per
block.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import EvalError, positive_int, print_table, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.bench._attention_timing import Setting

CPU_CASES = "2048:12,4096:12,8192:12,16384:4,32768:2,65536:1"
LEAST_BYTES = 16_000_000  # of q: below, the buffers of the libraries hide the peak
RIVALS = ("flash", "cudnn", "flash_attn_4", "flash_attn_2", "flex")  # on a GPU
SDPA, FLASH_2 = ("flash", "cudnn"), ("flash", "flash_attn_2")  # torch's own; FlashAttention-2, torch's copy of it first
GPU_CASES = "2048:16,4096:16,8192:16,16384:16,32768:16,65536:16,131072:16,262144:8,524288:4"


def cases(text: str) -> list[tuple[int, int]]:
    """argparse type: "tokens:heads,..."."""
    try:
        pairs = [tuple(int(number) for number in part.split(":")) for part in text.split(",")]
        found = [(tokens, heads) for tokens, heads in pairs if tokens > 0 and heads > 0]
    except ValueError:
        found = []
    if len(found) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 4096:12,8192:12 (tokens:heads)")
    return found


def rival_names(text: str) -> list[str]:
    """argparse type: a comma-separated list of RIVALS."""
    names = text.split(",")
    if not set(names) <= set(RIVALS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(RIVALS)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench attention`."""
    parser.add_argument("--cases", type=cases, metavar="T:H,...", help=f"tokens:heads (default on a CPU: {CPU_CASES})")
    parser.add_argument(
        "--forward-only", type=cases, default=[], metavar="T:H,...",
        help="MoBA's forward pass alone, at these; without --cases nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--rivals", type=rival_names, metavar="NAME,...", help=f"full attention on a GPU by {', '.join(RIVALS)} (all)"
    )
    parser.add_argument("--block-size", type=positive_int, default=512, metavar="N", help="default: 512")
    parser.add_argument("--top-k", type=positive_int, default=3, metavar="N", help="blocks per query (default: 3)")
    parser.add_argument("--head-dim", type=positive_int, help="default: 64, on a GPU 128")
    parser.add_argument(
        "--group", type=positive_int, default=1, metavar="N", help="query heads per KV head (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--bidirectional", action="store_true", help="no causal mask")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument(
        "--repetitions", type=positive_int, default=3, metavar="N", help="the least counts (default: 3)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for attention.json and attention.png")


def pairs(setting: Setting) -> tuple[float, float, float]:
    """(Query, key) pairs per head of full attention, of MoBA, and the gate's, each counted as half a pair."""
    import torch

    from neomoba_dist.train.flops import moba_pairs

    n, block = setting.length, setting.block_size
    gate = n * n / (block * (4 if setting.causal else 2))
    sparse = moba_pairs(torch.tensor([n]), size=block, top_k=setting.top_k, causal=setting.causal)
    return n * (n + 1) / 2 if setting.causal else n * n, float(sparse), gate


def pair_limit(setting: Setting) -> float:
    """Pairs of full attention over pairs of MoBA with its gate: what a kernel of the same speed could gain."""
    full, sparse, gate = pairs(setting)
    return max(1.0, full / (sparse + gate))


def tflops(setting: Setting, count: float, seconds: float, *, both: bool) -> float:
    """TFLOP/s of `count` pairs per head: two products forward, seven forward + backward, two operations each."""
    return count * setting.heads * setting.head_dim * (14 if both else 4) / seconds / 1e12


def settings(args: argparse.Namespace) -> list[Setting]:
    """One setting per case. Raises EvalError."""
    import torch

    from evals.bench._attention_timing import Setting

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: no GPU is visible to torch; use --device cpu")
    on_gpu = device == "cuda"
    if args.rivals and not on_gpu:
        raise EvalError("--rivals: a CPU has torch's SDPA alone; leave it out")
    found = []
    usual = [] if args.forward_only else cases(GPU_CASES if on_gpu else CPU_CASES)
    for length, heads in [*(args.cases or usual), *args.forward_only]:
        if heads % args.group:
            raise EvalError(f"--group {args.group} does not divide the {heads} heads of --cases {length}:{heads}")
        head_dim = args.head_dim or (128 if on_gpu else 64)
        dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
        shape = (length, heads, heads // args.group, head_dim, args.block_size, args.top_k)
        found.append(Setting(*shape, not args.bidirectional, dtype, device, args.threads))
    return found


def measure(setting: Setting, repetitions: int, names: list[str] | None, *, memory: bool) -> dict[str, Any]:
    """One row of the table: seconds, ratios against the fastest rival, and peak memory in tensors of the size of q."""
    from evals.bench._attention_timing import measure as seconds
    from evals.bench._attention_timing import peak_bytes

    rivals, peers, moba = seconds(setting, repetitions, names)
    full = min(rivals, key=lambda rival: rival.both)
    all_pairs, sparse_pairs, _ = pairs(setting)
    row: dict[str, Any] = {
        "length": setting.length,
        "heads": setting.heads,
        "full": full._asdict(),
        "moba": moba._asdict(),
        "rivals": {rival.name: rival._asdict() for rival in rivals},
        "moba_peers": {peer.name: peer._asdict() for peer in peers},
        "forward_ratio": full.forward / moba.forward,
        "both_ratio": full.both / moba.both,
        "pair_limit": pair_limit(setting),
        "full_tflops": tflops(setting, all_pairs, full.both, both=True),
        "moba_tflops": tflops(setting, sparse_pairs, moba.both, both=True),
    }
    size = setting.length * setting.heads * setting.head_dim * (4 if setting.dtype == "float32" else 2)
    if memory and size >= LEAST_BYTES:
        for kind in ("full", "moba"):
            row[f"{kind}_peak_bytes"] = peak_bytes(setting, kind)
            row[f"{kind}_peak_tensors"] = row[f"{kind}_peak_bytes"] / size
    return row


def measure_alone(setting: Setting, repetitions: int) -> dict[str, Any]:
    """MoBA's forward pass where nothing is compared."""
    from evals.bench._attention_timing import measure_forward

    seconds = measure_forward(setting, repetitions)
    rate = tflops(setting, pairs(setting)[1], seconds, both=False)
    return {"length": setting.length, "heads": setting.heads, "moba_forward": seconds, "moba_forward_tflops": rate}


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import torch

    torch.set_num_threads(args.threads)
    todo = settings(args)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "evals", "bench", "attention", *sys.argv[3:]]),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if todo[0].device == "cuda" else processor_name(),
        "setting": {name: value for name, value in todo[0]._asdict().items() if name not in ("length", "heads")},
        "rows": [],
        "forward_only": [],
    }
    compared = len(todo) - len(args.forward_only)
    for index, setting in enumerate(todo):
        if index < compared:
            result["rows"].append(measure(setting, args.repetitions, args.rivals, memory=not args.no_memory))
        else:
            result["forward_only"].append(measure_alone(setting, args.repetitions))
        print(f"{setting.length} tokens x {setting.heads} heads measured", file=sys.stderr, flush=True)
        if args.output is not None:  # after every row: a run that is stopped keeps what it has
            write_json(args.output, "attention", result)
    if compared:
        print_table([HEADER, *(_cells(row) for row in result["rows"])])
        for row in result["rows"]:
            others = [*row["rivals"].values(), *row["moba_peers"].values()]
            times = ", ".join(f"{other['name']} {1e3 * other['both']:.4g}" for other in others)
            print(f"{row['length']} tokens x {row['heads']}, f+b ms: moba {1e3 * row['moba']['both']:.4g}, {times}")
    for row in result["forward_only"]:
        speed = f"{row['moba_forward']:.4g} s, {row['moba_forward_tflops']:.0f} TFLOP/s"
        print(f"{row['length']} tokens x {row['heads']} heads, MoBA forward: {speed}")
    print(f"{result['machine']}, torch {result['torch']}")
    if args.output is not None and compared:
        try:
            from evals.plots import save_png

            save_png(figure(result["rows"]), args.output / "attention.png")
        except ImportError as error:  # a GPU machine may have torch and little else
            print(f"no plot: {error}", file=sys.stderr)
    return 0


HEADER = (
    "tokens", "heads", "rival", "full fwd s", "moba fwd s", "ratio", "full f+b s", "moba f+b s", "ratio", "limit",
    "full TF/s", "moba TF/s", "full mem", "moba mem",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    full, moba = row["full"], row["moba"]
    times = [full["forward"], moba["forward"], row["forward_ratio"], full["both"], moba["both"], row["both_ratio"]]
    memory = [
        f"{row[f'{kind}_peak_tensors']:.1f}" if f"{kind}_peak_tensors" in row else "-" for kind in ("full", "moba")
    ]
    numbers = [f"{x:.2f}" if index in (2, 5) else f"{x:.4g}" for index, x in enumerate(times)]
    rates = [f"{row[f'{kind}_tflops']:.3g}" for kind in ("full", "moba")]
    head = [str(row["length"]), str(row["heads"]), full["name"]]
    return [*head, *numbers, f"{row['pair_limit']:.2f}", *rates, *memory]


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Time per head, speed-up and memory against length; the limit by pair count is dashed."""
    from matplotlib.figure import Figure

    from evals.plots import COLOURS, MUTED, style

    lengths = [row["length"] for row in rows]
    with style():
        drawn = Figure(figsize=(9.6, 3.2), layout="constrained")
        with_memory = any("moba_peak_tensors" in row for row in rows)
        time_axes, ratio_axes, *memory_axes = drawn.subplots(1, 3 if with_memory else 2)
        for kind in ("full", "moba"):
            per_head = [row[kind]["both"] / row["heads"] for row in rows]
            time_axes.plot(lengths, per_head, marker="o", markersize=3, color=COLOURS[kind], label=kind)
            peaks = {row["length"]: row[f"{kind}_peak_tensors"] for row in rows if f"{kind}_peak_tensors" in row}
            for axes in memory_axes:
                axes.plot(list(peaks), list(peaks.values()), marker="o", markersize=3, color=COLOURS[kind])
        for key, name, marker in (("forward_ratio", "forward", "o"), ("both_ratio", "forward + backward", "s")):
            ratios = [row[key] for row in rows]
            ratio_axes.plot(lengths, ratios, marker=marker, markersize=3, color=COLOURS["moba"], label=name)
        ratio_axes.plot(lengths, [row["pair_limit"] for row in rows], "--", color=MUTED, label="limit by pairs")
        titles = {
            time_axes: "Forward + backward, seconds per head",
            ratio_axes: "Speed-up over full attention",
            **dict.fromkeys(memory_axes, "Peak memory, tensors of the size of q"),
        }
        for axes, title in titles.items():
            axes.set_xscale("log", base=2)
            axes.set_xlabel("tokens")
            axes.set_title(title)
        time_axes.set_yscale("log")
        ratio_axes.set_yscale("log", base=2)
        for axes in memory_axes:
            axes.set_ylim(bottom=0)
        time_axes.legend()
        ratio_axes.legend()
    return drawn
