"""The picture of an ablation: validation loss as training goes on, and each number of the table by arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from evals.grid import Grid
from evals.plots import BLUE, MUTED, ORANGE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, "#5b9e5f", "#a8669c", "#8a7a55", "#3f4f7a", "#c25b5b")


def figure(result: Mapping[str, Any]) -> Figure:
    """Left: validation loss over tokens, mean of the seeds, with their range. Then a panel for each metric: every seed
    a dot, the mean a line, chance dashed. result: what `ablation` writes."""
    found, metrics = result["arms"], [Grid.Metric(**entry) for entry in result["metrics"]]
    with style():
        drawn = Figure(figsize=(4.8 + 2.9 * len(metrics), 1.6 + 0.34 * max(6, len(found))), layout="constrained")
        drawn.suptitle(result["question"], x=0.01, ha="left", fontsize=10)
        curve_axes, *panels = drawn.subplots(1, 1 + len(metrics), width_ratios=[1.6, *[1] * len(metrics)])
        colours = {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(found)}
        _curves(curve_axes, result["curves"], colours)
        for axes, metric in zip(panels, metrics, strict=True):
            _panel(axes, metric, found, colours, names=axes is panels[0])
        return drawn


def _curves(axes: Axes, curves: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    for arm, curve in curves.items():
        tokens, losses = curve["tokens"], np.array(curve["validation_loss"])
        axes.plot(tokens, losses.mean(0), color=colours[arm], label=arm)
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=colours[arm], alpha=0.2, linewidth=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens seen in training", ylabel="validation loss, nats per token")
    axes.legend()


def _panel(
    axes: Axes,
    metric: Grid.Metric,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    colours: Mapping[str, str],
    *,
    names: bool,
) -> None:
    for line, (arm, runs) in enumerate(found.items()):
        values = [run[metric.key] for run in runs if metric.key in run]
        axes.plot(values, [line] * len(values), "o", color=colours[arm], markersize=4, alpha=0.6)
        if values:
            axes.plot([mean(values)] * 2, [line - 0.25, line + 0.25], color=colours[arm], linewidth=2.5)
    if metric.chance is not None:
        axes.axvline(metric.chance, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "chance", (metric.chance, 1), (3, -9), ("data", "axes fraction"), "offset points", color=MUTED, fontsize=8
        )
    axes.set_yticks(range(len(found)), list(found) if names else [""] * len(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{_tick(metric.form)}}"))
    axes.set_xlabel(metric.label)


def _tick(form: str) -> str:
    """Axes need fewer digits than the table."""
    return ".0%" if form.endswith("%") else ",.4g"
