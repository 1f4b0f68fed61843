"""Tokens per CPU second of the loader, against a flat memory-mapped file and webdataset with one member per document.

All pack, mask (20 %, 80/10/10) and build tensors with the same code, in one process and one thread, a few updates of
one source after a few of the other. Rates are the best of several passes over the corpus, ratios the median of their
ratios pass by pass, which a busy machine disturbs least. "flat" reads the same rows in the same order; "flat,
in order" reads the file from its start to its end. The loader's first pass checks the crc32 of every member; "2nd
pass" is what remains afterwards. Prints a table; --output also gets loader.json and loader.png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import list_of, positive_int, print_table, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCES = ("loader", "loader, 2nd pass", "loader, thread", "flat", "flat, in order", "webdataset")
TURN = 4  # updates
GOALS = {1024: (0.75, 1.25), 4096: (0.75, None), 32_768: (0.75, 2.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench loader`."""
    lengths = list_of(positive_int)
    default = "1024,4096,32768"
    parser.add_argument(
        "--lengths", type=lengths, default=lengths(default), metavar="L,...", help=f"default: {default}"
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="folder of shards (default: random, web-like lengths)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=16_000_000, metavar="N", help="of the random corpus (default: 16000000)"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=positive_int, default=32_768, metavar="N", help="default: 32768, or a longer row"
    )
    parser.add_argument("--accumulation", type=positive_int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--repetitions", type=positive_int, default=3, metavar="N", help="the best counts (default: 3)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for loader.json and loader.png")


def cpu_seconds(updates: dict[str, Iterator[list]], count: int) -> dict[str, float]:
    """CPU seconds of the process for `count` updates of each source, a few of one after a few of the other."""
    seconds = dict.fromkeys(updates, 0.0)
    for done in range(0, count, TURN):
        for name, source in updates.items():
            began = time.process_time()
            for _ in islice(source, min(TURN, count - done)):
                pass
            seconds[name] += time.process_time() - began
    return seconds


def measure(folder: Path, length: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One row of the table: rates in tokens per CPU second, and seconds to the first batch of a resume."""
    from evals.bench import _loader_peers as peers
    from neomoba_dist.data.check import open_corpus

    corpus = open_corpus(folder)
    shape = peers.Shape(length, max(1, args.micro_batch_tokens // length), args.accumulation)
    size = shape.micro * shape.accumulation
    rates: dict[str, list[float]] = {name: [] for name in SOURCES}
    for _ in range(args.repetitions):
        warm = peers.Loader(folder, shape)
        count = max(1, warm.rows // size)
        for _ in islice(warm.updates, count + 1):
            pass
        sources: dict[str, Any] = {
            "loader": peers.Loader(folder, shape),
            "loader, 2nd pass": warm,
            "flat": peers.FlatFile(corpus, scratch, shape),
            "flat, in order": peers.FlatFile(corpus, scratch, shape, in_order=True),
            "webdataset": peers.WebDataset(corpus, scratch, shape),
        }
        spent = cpu_seconds({name: peer.updates for name, peer in sources.items()}, count)
        # alone: its thread would work in the turns of the others
        sources["loader, thread"] = peers.Loader(folder, shape, prefetch=2)
        spent |= cpu_seconds({"loader, thread": sources["loader, thread"].updates}, count)
        for name, seconds in spent.items():
            rates[name].append(count * size * length / seconds)
        for peer in sources.values():
            peer.updates.close()

    def over(peer: str) -> float:
        return median(mine / other for mine, other in zip(rates["loader"], rates[peer], strict=True))

    return {
        "length": length,
        "rates": {name: max(found) for name, found in rates.items()},
        "to_flat": over("flat"),
        "to_flat_in_order": over("flat, in order"),
        "to_webdataset": over("webdataset"),
        "goals": GOALS.get(length, (None, None)),
        "padding_share": warm.stream.padding_share,
        "resume_seconds": peers.first_batch_seconds(folder, shape, scratch / "cache", 0.9),
    }


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import torch

    from evals.bench import _loader_peers as peers

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="neomoba-bench-") as name:
        scratch = Path(name)
        folder = args.corpus
        if folder is None:
            folder = scratch / "corpus"
            corpus = peers.web_like_corpus(folder, args.tokens)
            print(f"{corpus.documents} documents, {corpus.tokens} tokens written", file=sys.stderr)
        rows = []
        for length in args.lengths:
            rows.append(measure(folder, length, args, scratch))
            print(f"rows of {length} tokens measured", file=sys.stderr)
    print_table([HEADER, *(_cells(row) for row in rows)])
    print(processor_name(), file=sys.stderr)  # the table alone is the output
    if args.output is not None:
        from evals.plots import save_png

        result = {
            "command": shlex.join(["python", "-m", "evals", "bench", "loader", *sys.argv[3:]]),
            "machine": processor_name(),
            "unit": "tokens per CPU second",
            "corpus": "random" if args.corpus is None else str(args.corpus),
            "rows": rows,
        }
        write_json(args.output, "loader", result)
        save_png(figure(rows), args.output / "loader.png")
    return 0


HEADER = ("M tokens / CPU s", *SOURCES, "/ flat", "/ in order", "/ webdataset", "padding", "resume s")


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [f"{row['rates'][name] / 1e6:.1f}" for name in SOURCES]
    ratios = [f"{row[key]:.2f}" for key in ("to_flat", "to_flat_in_order", "to_webdataset")]
    return [f"{row['length']}", *rates, *ratios, f"{row['padding_share']:.3%}", f"{row['resume_seconds']:.3f}"]


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Rates by length, and the loader's ratios with their goals."""
    from matplotlib.figure import Figure

    from evals.plots import BLUE, MUTED, ORANGE, style

    places = list(range(len(rows)))
    with style():
        drawn = Figure(figsize=(8.4, 3.2), layout="constrained")
        rate_axes, ratio_axes = drawn.subplots(1, 2)
        shown = {"loader": BLUE, "flat": ORANGE, "webdataset": MUTED}
        for i, (name, colour) in enumerate(shown.items()):
            values = [row["rates"][name] / 1e6 for row in rows]
            rate_axes.bar([place + 0.26 * (i - 1) for place in places], values, 0.24, color=colour, label=name)
        for i, (name, colour) in enumerate((("flat", ORANGE), ("webdataset", MUTED))):
            centres = [place + 0.26 * (i - 0.5) for place in places]
            ratio_axes.bar(centres, [row[f"to_{name}"] for row in rows], 0.24, color=colour, label=f"/ {name}")
            for centre, row in zip(centres, rows, strict=True):
                if (goal := row["goals"][i]) is not None:
                    ratio_axes.plot([centre - 0.12, centre + 0.12], [goal, goal], color=BLUE)
        rate_axes.set_title("Million tokens per CPU second")
        ratio_axes.set_title("Loader over its peers; line: goal")
        for axes in (rate_axes, ratio_axes):
            axes.set_xticks(places, [f"{row['length']:,}" for row in rows])
            axes.set_xlabel("tokens in a row")
            axes.legend()
    return drawn
