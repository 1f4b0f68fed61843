"""Grids of ablations: ds_configs/ablations/NAME.json, checked key by key.

{"question": "...",
 "sizes": {"tiny": {
     "ds_config": "cpu_tiny_clm.json",                      of ds_configs/
     "set": {"neomoba.phase.steps": 300},                   for all arms; may be missing
     "phases": [{"neomoba.phase.sequence_length": 256}, {}], one after the other; may be missing: one
     "seeds": [1, 2, 3],
     "arms": {"full": {"neomoba.model.attention": "full"}, "MoBA": {}},
     "evaluate": ["--tasks", "needle", "--lengths", "512"], arguments of `python -m evals run`; may be missing
     "decode": {"prompt": 128, "new": 64, "documents": 4},  decoding speed; may be missing
     "metrics": [{"label": "validation loss", "key": "validation_loss", "form": ".4f", "chance": 0.1}]}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.cli import EvalError

ROOT = Path(__file__).resolve().parent.parent
GRIDS = ROOT / "ds_configs" / "ablations"


@dataclass(frozen=True)
class Grid:
    """A question and, by size, what is trained to answer it."""

    @dataclass(frozen=True)
    class Metric:
        """A column of the table. form: Python's format of the number. chance: what guessing gives; drawn as a line."""

        label: str
        key: str
        form: str = ".4f"
        chance: float | None = None

    @dataclass(frozen=True)
    class Size:
        """The models of one size; see the module's text."""

        ds_config: Path
        seeds: list[int]
        arms: dict[str, dict[str, Any]]
        metrics: list[Grid.Metric]
        shared: dict[str, Any] = field(default_factory=dict)
        phases: list[dict[str, Any]] = field(default_factory=lambda: [{}])
        evaluate: list[str] = field(default_factory=list)
        decode: dict[str, int] = field(default_factory=dict)

    name: str
    question: str
    sizes: dict[str, Grid.Size]

    def size(self, name: str) -> Grid.Size:
        """The size of this name. Raises EvalError."""
        if name not in self.sizes:
            raise EvalError(f"--size {name}: {self.name} has none of this name; choose from: {', '.join(self.sizes)}")
        return self.sizes[name]


def grid_names() -> list[str]:
    """The grids that are shipped."""
    return sorted(file.stem for file in GRIDS.glob("*.json"))


def read_grid(name: str) -> Grid:
    """A shipped grid by name, or a file. Raises EvalError that names the file and the key."""
    file = GRIDS / f"{name}.json" if name in grid_names() else Path(name)
    if not file.is_file():
        raise EvalError(f"ablation {name}: no such grid and no such file; choose from: {', '.join(grid_names())}")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{file}: cannot be read ({error})") from error
    known = _checked(file, "", tree, {"question": str, "sizes": dict}, {})
    sizes = {size: _size(file, f"sizes.{size}", found) for size, found in known["sizes"].items()}
    if not sizes:
        raise EvalError(f"{file}: sizes is empty; give one, for example tiny")
    return Grid(file.stem, known["question"], sizes)


def _size(file: Path, path: str, tree: Any) -> Grid.Size:
    needed = {"ds_config": str, "seeds": list, "arms": dict, "metrics": list}
    known = _checked(file, path, tree, needed, {"set": dict, "phases": list, "evaluate": list, "decode": dict})
    for key in ("seeds", "arms", "metrics"):
        if not known[key]:
            raise EvalError(f"{file}: {path}.{key} is empty; give at least one")
    blocks = {f"arms.{arm}": keys for arm, keys in known["arms"].items()}
    blocks |= {f"phases[{number}]": keys for number, keys in enumerate(known.get("phases", []))}
    for name, keys in blocks.items():
        if not isinstance(keys, dict):
            raise EvalError(f"{file}: {path}.{name} is no object of keys and values")
    metrics = []
    for place, entry in enumerate(known["metrics"]):
        found = _checked(
            file, f"{path}.metrics[{place}]", entry, {"label": str, "key": str}, {"form": str, "chance": float}
        )
        metrics.append(Grid.Metric(**found))
    known["shared"] = known.pop("set", {})
    return Grid.Size(**{**known, "ds_config": ROOT / "ds_configs" / known["ds_config"], "metrics": metrics})


def _checked(
    file: Path, path: str, tree: Any, needed: Mapping[str, type], optional: Mapping[str, type]
) -> dict[str, Any]:
    """`tree`, an object with all `needed` and any of the `optional` keys, each of its type. Raises EvalError."""
    where = f"{file}: {path}" if path else str(file)
    if not isinstance(tree, dict):
        raise EvalError(f"{where}: is no JSON object")
    if missing := [key for key in needed if key not in tree]:
        raise EvalError(f"{where}: {missing[0]} is missing")
    for key, value in tree.items():
        kind = {**needed, **optional}.get(key)
        if kind is None:
            raise EvalError(f"{where}: no key {key} is known; there are {', '.join((*needed, *optional))}")
        if not isinstance(value, (int, float) if kind is float else kind):
            raise EvalError(f"{where}: {key} is no {kind.__name__}")
    return dict(tree)
