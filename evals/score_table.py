"""What tasks have in common that end in a few numbers, "rows" of {"name", "metric", "value", "samples"}: four functions
of a task, which `glue`, `mteb` and `validation_loss` take from here. Values are shares, shown as percent, unless the
result has a "unit"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.tasks import Result, Scores, Table


def scores(result: Result) -> Scores:
    """The metrics for results_*.json."""
    found: Scores = {}
    for row in result["rows"]:
        entry = found.setdefault(f"{result['task']}:{row['name']}", {"samples": row["samples"]})
        entry[row["metric"]] = row["value"]
    return found


def csv(result: Result) -> Table:
    """One line per number."""
    keys = ("name", "metric", "value", "samples")
    return [list(keys), *([str(row[key]) for key in keys] for row in result["rows"])]


def table(result: Result) -> Table:
    """The same, to be read."""
    unit = result.get("unit")
    values = [f"{row['value']:.4f}" if unit else f"{100 * row['value']:.2f}" for row in result["rows"]]
    return [
        ["task", "metric", unit or "score, %", "texts"],
        *(
            [r["name"], r["metric"], value, f"{r['samples']:,}"]
            for r, value in zip(result["rows"], values, strict=True)
        ),
    ]


def figure(result: Result) -> Figure:
    """A bar per number."""
    from matplotlib.figure import Figure

    from evals.tasks import load_task

    rows, unit = result["rows"], result.get("unit")
    values = [row["value"] if unit else 100 * row["value"] for row in rows]
    found = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = found.subplots()
    names = [f"{row['name']}, {row['metric']}" for row in rows]
    bars = axes.barh(names, values, height=0.7)
    axes.bar_label(bars, fmt="%.4f" if unit else "%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(min(0, *values), 1.09 * max(values) if unit else 109)
    axes.set_xlabel(unit or "score, %")
    axes.set_title(load_task(result["task"]).TITLE, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return found
