"""Models trained alike but for the keys under study, evaluated and compared: `python -m evals ablation NAME`.

NAME is a grid: a JSON of ds_configs/ablations/, or the path of one of your own. It states a question and, for each size
("tiny" for two CPU cores, "125m" for GPUs), the configuration, the arms by name with the keys in which they differ, the
seeds, what is evaluated and which numbers go into the table. Everything that an arm does not name is the same: corpus,
tokenizer, validation rows, length, tokens. Each arm and seed is a run folder of its own; rerun it to resume, or share
the runs out over jobs with --part first. Writes NAME.json, NAME.csv and NAME.png into --output.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, print_table, write_json
from evals.grid import GRIDS, ROOT, Grid, grid_names, read_grid
from neomoba_dist.config import Config, load_config
from neomoba_dist.errors import FailedError

if TYPE_CHECKING:
    from evals.runs import Run

RUN_METRICS = (
    "active_parameters", "parameters", "num_key_value_heads", "feed_forward_width", "tokens", "validation_loss",
    "train_tokens_per_second",
)  # fmt: skip

FORMAT = "neomoba-ablation-1"


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: what each phase sets, as `--set` takes it, and its run folder."""

    arm: str
    seed: int
    phases: list[tuple[Path, list[str]]]

    @property
    def folder(self) -> Path:
        """The run that is evaluated."""
        return self.phases[-1][0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m evals ablation`."""
    found = "\n".join(f"  {name:12} {read_grid(name).question}" for name in grid_names())
    parser.epilog = f"grids in {GRIDS.relative_to(ROOT)}:\n{found}"
    parser.add_argument("grid", metavar="NAME", help="a grid of the list below, or a JSON file")
    parser.add_argument("--size", default="tiny", metavar="SIZE", help="of the models (default: tiny)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs and results")
    parser.add_argument("--ranks", type=positive_int, default=1, metavar="N", help="processes or GPUs (default: 1)")
    parser.add_argument(
        "--part", type=part, metavar="I/N",
        help="only the I-th of N equal parts of the runs, and no table; then all at once without it, for the table",
    )  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH.TO.KEY=VALUE", help="changes keys of all arms")


def part(text: str) -> slice:
    """Of a list, what "I/N" stands for: its I-th, I+N-th, ... entries, counted from 1."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as in 2/8")
    return slice(int(number) - 1, None, int(count))


def run(args: argparse.Namespace) -> int:
    """Train and evaluate what is not there yet, then print, draw and write the comparison."""
    grid = read_grid(args.grid)
    size = grid.size(args.size)
    cells = [make_cell(args.output, size, arm, seed, args.set) for arm in size.arms for seed in size.seeds]
    for cell in cells:  # all of them before the first hour of training
        for folder, words in cell.phases:
            config = load_config(size.ds_config, words)
            if size.decode and not config.model.causal:
                raise EvalError(f"{args.grid}: only a causal model decodes; set neomoba.model.objective to clm")
            require_same(folder, config)
    for cell in cells[args.part] if args.part else cells:
        train(size.ds_config, cell, args.ranks)
        if size.evaluate:
            evaluate(cell.folder, size.evaluate, args.ranks)
    if args.part:
        return 0
    compare(grid, args, cells)
    return 0


def compare(grid: Grid, args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """The trained and evaluated cells side by side: printed, drawn, written."""
    from evals.runs import read_run

    size = grid.size(args.size)
    found: dict[str, list[dict[str, float]]] = {}
    runs: dict[str, list[Run]] = {}
    for cell in cells:
        trained = read_run(cell.folder)
        runs.setdefault(cell.arm, []).append(trained)
        found.setdefault(cell.arm, []).append(measure(trained, size))
    lines = table(found, size.metrics)
    print_table(lines)
    result = {
        "format": FORMAT,
        "grid": grid.name,
        "size": args.size,
        "question": grid.question,
        "command": sys.argv[1:],
        "seeds": size.seeds,
        "arms": found,
        "metrics": [asdict(metric) for metric in size.metrics],
        "curves": {arm: curves(seeds) for arm, seeds in runs.items()},
    }
    write_json(args.output, grid.name, result)
    with (args.output / f"{grid.name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(seed_lines(found, size))
    from evals.ablation_plot import figure
    from evals.plots import save_png

    save_png(figure(result), args.output / f"{grid.name}.png")


def curves(seeds: Sequence[Run]) -> dict[str, Any]:
    """Validation losses of every seed of an arm, and the tokens seen before each."""
    series = [run.series("validation_loss", 0) for run in seeds]
    return {"tokens": series[0][0].tolist(), "validation_loss": [losses.tolist() for _, losses in series]}


def read_result(folder: Path) -> dict[str, Any]:
    """What an --output folder holds of an ablation. Raises EvalError."""
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvalError(f"{file}: cannot be read ({error}); run the ablation again") from error
        if isinstance(result, dict) and result.get("format") == FORMAT:
            return result
    raise EvalError(
        f"--ablation {folder}: no result of an ablation here, or one of an older version; run python -m evals ablation "
        f"NAME --output {folder} (again): what is trained stays"
    )


def make_cell(output: Path, size: Grid.Size, arm: str, seed: int, more: Sequence[str]) -> Cell:
    """--set comes before the arm's own keys, which are what is studied."""
    folder = output / arm.replace(" ", "_") / str(seed)
    phases = []
    for number, keys in enumerate(size.phases):
        own = {**size.arms[arm], "neomoba.phase.seed": seed}
        words = [*_words({**size.shared, **keys}), *more, *_words(own)]
        phases.append((folder / f"phase{number + 1}" if len(size.phases) > 1 else folder, words))
    return Cell(arm, seed, phases)


def _words(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def require_same(folder: Path, config: Config) -> None:
    """Raises EvalError where the folder holds a run with other settings, which would pass for this one's."""
    file = folder / "config.json"
    if not file.is_file():
        return
    from neomoba_dist.train.guard import flat

    then, now = (flat(tree) for tree in (json.loads(file.read_text(encoding="utf-8")), config.to_dict()))
    other = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    if other:
        shown = ", ".join(f"{key} {then.get(key, 'null')}, not {now.get(key, 'null')}" for key in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise EvalError(f"{folder}: was trained with {shown}{more}; give another --output, or delete this folder")


def train(ds_config: Path, cell: Cell, ranks: int) -> None:
    """All phases of a cell; finished ones are left alone. Raises FailedError when one fails."""
    program = [str(ROOT / "launch" / "pretrain.py"), "--ds_config", str(ds_config)]
    before: list[str] = []
    for folder, words in cell.phases:
        print(f"== {cell.arm}, seed {cell.seed}: {folder}", flush=True)
        command = [*_start(ranks), *program, "--output_dir", str(folder), *before, "--set", *words]
        if subprocess.run(command, check=False).returncode:
            raise FailedError(f"{folder}: the training failed; its message is above")
        before = ["--init_from", str(folder)]


def evaluate(folder: Path, arguments: Sequence[str], ranks: int) -> None:
    """The grid's tasks on a finished run; what is in the journal already is not computed again."""
    command = [*_start(ranks), "-m", "evals", "run", "--checkpoint", str(folder), "--output", str(folder / "evals")]
    if subprocess.run([*command, *arguments], check=False, cwd=ROOT).returncode:
        raise FailedError(f"{folder}: the evaluation failed; its message is above")


def _start(ranks: int) -> list[str]:
    """The interpreter, or a launcher that finds a free port: other grids may run on the same host."""
    if ranks == 1:
        return [sys.executable]
    return [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks)]


def measure(trained: Run, size: Grid.Size) -> dict[str, float]:
    """All numbers of one run by name."""
    model = trained.config.model
    width = model.moe_intermediate_size if model.num_experts else model.intermediate_size
    values = (
        active_parameters(trained.config), trained.parameters, model.num_key_value_heads, width, trained.tokens,
        trained.validation_loss, trained.tokens_per_second,
    )  # fmt: skip
    found: dict[str, Any] = dict(zip(RUN_METRICS, values, strict=True))
    if size.decode:
        from evals.decoding import decode

        found |= decode(trained.folder, **size.decode)
    if size.evaluate:
        found |= evaluated(trained.folder / "evals")
    return {name: value for name, value in found.items() if value is not None}


def evaluated(folder: Path) -> dict[str, float]:
    """The tasks' scores as TASK_ATTENTION.METRIC, and as TASK.METRIC those of the model's own attention."""
    from evals.results import read_results
    from evals.tasks import load_task

    found: dict[str, float] = {}
    for name, result in read_results(folder).items():
        scores = load_task(name).scores(result)
        own = next(iter(scores))  # tasks name the model's own attention first
        for entry, values in (*scores.items(), (name, scores[own])):
            found |= {f"{entry}.{key}": value for key, value in values.items() if value is not None}
    return found


def active_parameters(config: Config) -> int:
    """Weights of all layers that one token passes, without embeddings and norms."""
    from neomoba_dist.train.flops import feed_forward_weights

    model = config.model
    assert model.head_dim is not None  # resolved by ModelConfig
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    layers = model.num_layers + model.num_decoder_layers  # cross attention has as many weights
    return layers * attention + feed_forward_weights(model)


def table(found: dict[str, list[dict[str, float]]], metrics: Sequence[Grid.Metric]) -> list[list[str]]:
    """One line per arm: the mean over its seeds, ± their standard deviation, and of the first metric the difference to
    the first arm."""
    reference = _values(next(iter(found.values())), metrics[0].key)
    lines = [["", *(metric.label for metric in metrics), f"{metrics[0].label.split(',')[0]}, difference to the first"]]
    for arm, runs in found.items():
        cells = []
        for metric in metrics:
            values = _values(runs, metric.key)
            spread = f" ± {stdev(values):{metric.form}}" if len(values) > 1 else ""
            cells.append(f"{mean(values):{metric.form}}{spread}" if values else "")
        first = _values(runs, metrics[0].key)
        cells.append(f"{100 * (mean(first) / mean(reference) - 1):+.2f} %" if mean(reference) else "")
        lines.append([arm, *cells])
    return lines


def _values(runs: Sequence[dict[str, float]], key: str) -> list[float]:
    return [run[key] for run in runs if key in run]


def seed_lines(found: dict[str, list[dict[str, float]]], size: Grid.Size) -> list[list[str]]:
    """The numbers behind the picture: one line per arm and seed, every number that was measured."""
    keys = sorted({key for runs in found.values() for run in runs for key in run})
    return [["arm", "seed", *keys]] + [
        [arm, str(seed), *(str(run.get(key, "")) for key in keys)]
        for arm, runs in found.items()
        for seed, run in zip(size.seeds, runs, strict=True)
    ]
