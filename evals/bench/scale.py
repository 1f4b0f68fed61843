"""A start at a scale that no machine at hand has, as rank 1 of N in a world without the others.

Each line is a process that does what a rank does from its start to its first checkpoint, with torch's "fake" process
group, whose collectives return at once. Two tables: a corpus of so many documents, planned by one rank alone, and ranks
of models in their layouts (ds_configs/scale_*.json), on the largest of these corpora. Seconds are processor seconds of
one core; memory is the most that the process held during a stage. A layout that does not fit N ranks, or whose rank
needs more memory than the machine has, is left out. Corpora are sparse files, 90 MB of disk per million documents with
their plan; they are made once.

stages:
  config       read and checked, for N ranks
  imports      of torch, DeepSpeed and the rest
  mesh         process groups
  corpus       the index, and this rank's share of the shards and tables (rank 1 has the largest)
  plan         this rank's share of the row plan
  first batch  its micro-batches of the first update
  weights      this rank's part of the model
  engine       with weights, optimizer and DeepSpeed's own groups
  save         this rank's files of a checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import EvalError, list_of, positive_int, print_table, write_json
from neomoba_dist.config import Config, load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
MODELS = ("250m", "1b", "7b", "70b")
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
ROOT = CONFIGS.parent
STAGES = ("config", "imports", "mesh", "corpus", "plan", "first batch", "weights", "engine", "save")
DATA_STAGES = ("corpus", "plan", "first batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench scale`."""
    parser.add_argument(
        "--ranks", type=list_of(positive_int), default=[8, 64, 512, 1024, 4096], metavar="N,...",
        help="default: 8,64,512,1024,4096",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=_models, default=list(MODELS), metavar="NAME,...", help=f"default: {','.join(MODELS)}"
    )
    parser.add_argument(
        "--documents", type=list_of(positive_int), default=[1_000_000, 10_000_000, 100_000_000], metavar="N,...",
        help="sizes of the corpora (default: 1000000,10000000,100000000)",
    )  # fmt: skip
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/scale"), metavar="DIR", help="of the corpora (default: runs/scale)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for scale.json and scale.png")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from evals.bench._scale_corpus import make_corpus

    if args.documents[0] < 20_000:
        raise EvalError(f"--documents {args.documents[0]}: too few for one update of 16M tokens; give at least 20000")
    for documents in args.documents:
        make_corpus(args.directory / str(documents), documents)
    corpora = []
    for documents in args.documents:
        with tempfile.TemporaryDirectory(dir=args.directory) as cache:
            corpora.append({"documents": documents, **_measure(args, "250m", 1, documents, Path(cache))})
    print_table(
        [("documents", *_titles(DATA_STAGES)), *(_cells(f"{row['documents']:,}", row, DATA_STAGES) for row in corpora)]
    )
    growth = {name: _growth([(row["documents"], row[name]) for row in corpora]) for name in DATA_STAGES}
    for name, found in growth.items():
        if found:
            print(f"{name}: seconds grow with documents^{found[0]:.2f}, memory with documents^{found[1]:.2f}")
    print()
    ranks, cache = [], args.directory / "cache"
    if args.models:
        print_table([("model", "ranks", *_titles(STAGES))])
    for model in args.models:
        config = load_config(CONFIGS / f"scale_{model}.json")
        for world_size in args.ranks:
            if _fits(config, world_size):
                _make_plan(args, model, cache)
                row = {
                    "model": model,
                    "ranks": world_size,
                    **_measure(args, model, world_size, args.documents[-1], cache),
                }
                print_table([(model, *_cells(str(world_size), row, STAGES))])
                ranks.append(row)
    print(processor_name(), file=sys.stderr)
    if args.output is not None:
        command = shlex.join(["python", "-m", "evals", "bench", "scale", *sys.argv[3:]])
        result = {"command": command, "machine": processor_name(), "corpora": corpora, "growth": growth, "ranks": ranks}
        write_json(args.output, "scale", result)
        from evals.plots import save_png

        save_png(figure(corpora, ranks), args.output / "scale.png")
    return 0


def _models(text: str) -> list[str]:
    """argparse type: names of MODELS; an empty text: none."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(MODELS):
        raise EvalError(f"--models {','.join(sorted(unknown))}: no such model; choose from: {', '.join(MODELS)}")
    return names


def _fits(config: Config, world_size: int) -> bool:
    """Whether the layout fits the ranks, and a rank the machine's memory: 16 bytes per parameter, and 1 GiB."""
    parallel = config.parallel
    share = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % share:
        return False
    model = config.model
    assert model.head_dim is not None
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    layer = model.hidden_size * (heads + model.mlp_matrices * model.intermediate_size)
    parameters = model.num_hidden_layers * layer + 2 * model.vocab_size * model.hidden_size
    if config.zero_stage == 3:
        share = world_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16 * parameters / share + 2**30 < memory


def _make_plan(args: argparse.Namespace, model: str, cache: Path) -> None:
    """The plan of the largest corpus in the cache that ranks share, unless it is there."""
    from data_tools import plan_rows

    corpus = args.directory / str(args.documents[-1])
    keys = [f"neomoba.data.train={corpus}", f"neomoba.data.cache={cache}"]
    plan_rows.main(["--ds_config", str(CONFIGS / f"scale_{model}.json"), "--set", *keys])


def _measure(args: argparse.Namespace, model: str, world_size: int, documents: int, cache: Path) -> dict[str, Any]:
    """What a process says of its stages, by their names."""
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        config, corpus = CONFIGS / f"scale_{model}.json", args.directory / str(documents)
        words = [config, min(1, world_size - 1), world_size, corpus.resolve(), cache.resolve(), Path(scratch).resolve()]
        result = subprocess.run(
            [sys.executable, "-m", "evals.bench._scale_rank", *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise EvalError(f"scale_{model}.json on {world_size} ranks: {result.stderr.strip()[-2000:]}")
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"stage"')]
    return {line.pop("stage"): line for line in lines}


def _titles(stages: Sequence[str]) -> tuple[str, ...]:
    return tuple(title for stage in stages for title in (f"{stage} s", "MiB"))


def _cells(name: str, row: dict[str, Any], stages: Sequence[str]) -> tuple[str, ...]:
    """Seconds and most memory of each stage; under ZeRO-3 the weights come with the engine."""
    cells = [name]
    for stage in stages:
        found = row.get(stage)
        cells += ["-", "-"] if found is None else [f"{found['cpu']:.2f}", f"{found['peak'] / MIB:.0f}"]
    return tuple(cells)


def _growth(points: Sequence[tuple[int, dict[str, Any]]]) -> tuple[float, float] | None:
    """Exponents of seconds and of memory above what was held before, between the smallest and the largest size."""
    (few, small), (many, large) = points[0], points[-1]
    if few == many:
        return None
    span = math.log(many / few)
    above = [max(MIB, found["peak"] - found["before"]) for found in (small, large)]
    return math.log(large["cpu"] / small["cpu"]) / span, math.log(above[1] / above[0]) / span


def figure(corpora: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of the data's stages over documents, and of a start over ranks; both axes logarithmic."""
    from matplotlib.figure import Figure

    from evals.plots import style

    with style():
        drawn = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = drawn.subplots(1, 2)
        for name in DATA_STAGES:
            left.loglog([r["documents"] for r in corpora], [r[name]["cpu"] for r in corpora], marker="o", label=name)
        for model in dict.fromkeys(row["model"] for row in ranks):
            rows = [row for row in ranks if row["model"] == model]
            seconds = [
                sum(row[stage]["cpu"] for stage in STAGES if stage not in ("weights", "imports")) for row in rows
            ]
            right.loglog([row["ranks"] for row in rows], seconds, marker="o", label=model)
        for axes, x, title in ((left, "documents", "One rank alone"), (right, "ranks", "A start without imports")):
            axes.set(xlabel=x, ylabel="processor seconds", title=title)
            if axes.lines:
                axes.legend()
    return drawn
