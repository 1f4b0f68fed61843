"""Figures of single layers: how evenly experts are used, gradient norms, activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.plots import HEAT, style, thinned, token_axis, with_starts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from evals.runs import Run

LAYER_COLOURS = mpl.colors.LinearSegmentedColormap.from_list("depth", ["#cf7a35", "#8b8f97", "#2f6f9f"])
MOST_LINES = 12  # layers drawn; of deeper models an even choice
LAST_STEPS = 10


def expert_loads(run: Run) -> np.ndarray:
    """Rows of every expert over the last steps, over the mean of its layer: float64 [layers, experts]."""
    rows_LE = np.array([entry["tokens_per_expert"] for entry in run.steps[-LAST_STEPS:]], dtype=np.float64).sum(0)
    return rows_LE / rows_LE.mean(1, keepdims=True).clip(min=1e-9)


def expert_heatmap(run: Run) -> Figure:
    """Layers down, experts to the right: rows of the last steps, in shares of what each would get if all got alike."""
    load_LE = expert_loads(run)
    layers, experts = load_LE.shape
    with style():
        figure = Figure(
            figsize=(1.6 + max(2.4, min(8.0, 0.34 * experts)), max(2.5, 1.1 + 0.24 * layers)), layout="constrained"
        )
        draw_expert_loads(figure, figure.subplots(), load_LE, run.config.model.moe_layers)
        return figure


def draw_expert_loads(figure: FigureBase, axes: Axes, load_LE: np.ndarray, layers: Sequence[int]) -> None:
    """The loads of experts, 1 for a fair share, as a heat map with its colour bar. layers: their numbers."""
    top = max(2.0, math.ceil(load_LE.max()))
    image = axes.imshow(load_LE, cmap=HEAT, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator(min(load_LE.shape[1], 16), integer=True))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="expert", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, aspect=14, pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    bar.set_label("load (1 = fair share)")


def layer_figure(runs: Sequence[Run], key: str, label: str, *, logarithmic: bool = False) -> Figure:
    """One line per layer of a list in metrics.jsonl, from the first (orange) to the last one (blue)."""
    with style():
        figure = Figure(figsize=(4.7, 2.5), layout="constrained")
        axes: Axes = figure.subplots()
        for run, start in with_starts(runs):
            tokens, values_NL = run.layer_series(key, start)
            count = values_NL.shape[1] if len(tokens) else 0
            chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_LINES))}) if count else []
            for layer in chosen:
                colour = LAYER_COLOURS(layer / max(1, count - 1))
                axes.plot(*thinned(tokens, values_NL[:, layer]), color=colour, linewidth=0.9)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        token_axis(axes, runs, names=False)
        axes.set_ylabel(label)
        return figure
