"""Figures of RULER."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evals.plots import BLUE, HEAT, MUTED, ORANGE, style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from evals.tasks import Result

LINES = [BLUE, ORANGE, "#5a9a6b", "#8d6bb0", "#b05c6b", "#6b7680"]


def ruler_figure(result: Result) -> Figure:
    """Left: every task at every length; right: the average over lengths."""
    lengths, tasks = result["lengths"], result["tasks"]
    with style():
        height = 1.2 + 0.3 * len(tasks)
        figure = Figure(figsize=(9.6, max(3.2, height)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[max(1.0, 0.45 * len(lengths)), 1.3])
        scale = mpl.colors.Normalize(0, 100)
        for entry in result["scores"]:
            x, y = lengths.index(entry["length"]), tasks.index(entry["task"])
            left.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=HEAT(scale(entry["score"])), lw=0))
            shade = "#ffffff" if entry["score"] > 50 else "#24303a"
            left.text(x, y, f"{entry['score']:.0f}", ha="center", va="center", color=shade, fontsize=8.5)
        left.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(tasks) - 0.5, -0.5), xlabel="length, tokens")
        left.set_title("score, %")
        left.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        left.set_yticks(range(len(tasks)), tasks)
        left.grid(False)
        left.spines[:].set_visible(False)
        left.tick_params(length=0)
        draw_averages(right, {"": result})
        return figure


def average_figure(results: Mapping[str, Result]) -> Figure:
    """The averages over lengths, one line per checkpoint."""
    with style():
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        draw_averages(figure.subplots(), results)
        figure.legend(loc="outside upper right", ncols=3)
        return figure


def draw_averages(axes: Axes, results: Mapping[str, Result]) -> None:
    """Lines over lengths on a logarithmic axis, and the dashed line that decides the effective length."""
    lengths = sorted({length for result in results.values() for length in result["lengths"]})
    for i, (name, result) in enumerate(results.items()):
        found = [(each["length"], each["average"]) for each in result["averages"] if each["average"] is not None]
        axes.plot(*zip(*found, strict=True), color=LINES[i % len(LINES)], marker="o", markersize=4, label=name)
    threshold = next(iter(results.values()))["threshold"]
    axes.axhline(threshold, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"{threshold}", (0, threshold), (4, 3), ("axes fraction", "data"), "offset points", color=MUTED)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set(ylim=(0, 103), xlabel="length, tokens", ylabel="average score, %")
