"""The picture of `attention_map`: a panel for each layer and head, and the experts' shares below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from evals.layer_plots import draw_expert_loads
from evals.plots import HEAT, ORANGE, RULE, style
from evals.tasks import ATTENTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evals.tasks import Result

LEAST = 1e-3  # of a query's attention, in a cell: below it a cell is empty
TINT = 0.3  # of a block that all queries of a cell chose
PANEL = 2.3  # inches


def attention_figure(result: Result) -> Figure:
    """Layers down, heads to the right; then layers down and experts to the right."""
    maps = result["maps"]
    layers, heads = (list(dict.fromkeys(entry[key] for entry in maps)) for key in ("layer", "head"))
    experts = result["experts"]
    heights = [0.6 + PANEL * len(layers), *([1.2 + 0.24 * len(experts["layers"])] if experts else [])]
    with style():
        figure = Figure(figsize=(1.7 + PANEL * len(heads), sum(heights)), layout="constrained")
        upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        panels = upper.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
        norm = mpl.colors.LogNorm(LEAST, 1.0, clip=True)
        for axes, entry in zip(panels.flat, maps, strict=True):
            _draw(axes, entry, result, norm)
        for axes in panels[-1]:
            axes.set_xlabel("key, token")
        for axes in panels[:, 0]:
            axes.set_ylabel("query, token")
        bar = upper.colorbar(mpl.cm.ScalarMappable(norm, HEAT), ax=panels, aspect=24, pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)
        bar.set_ticks([LEAST, 0.01, 0.1, 1.0], labels=["< 0.1", "1", "10", "100"])
        bar.set_label("attention of the cell's queries, %")
        if any(entry["chosen"] for entry in maps):
            tint = Patch(facecolor=ORANGE, alpha=TINT, label="blocks chosen by MoBA")
            upper.legend(handles=[tint], loc="outside upper right")
        if experts:
            axes = lower[0].subplots()
            load = np.array(experts["shares"]) * len(experts["shares"][0])
            draw_expert_loads(lower[0], axes, load, experts["layers"])
        return figure


def _draw(axes: Axes, entry: dict[str, Any], result: Result, norm: mpl.colors.Normalize) -> None:
    """One map: chosen blocks as a tint, attention over it, darker where there is more."""
    tokens, block, cell = result["tokens"], result["block_size"], result["cell"]
    if entry["chosen"]:
        _image(axes, mpl.colors.to_rgb(ORANGE), TINT * np.array(entry["chosen"]), cell, block)
    mass = np.array(entry["mass"])
    scaled = norm(np.maximum(mass, LEAST))
    _image(axes, HEAT(scaled)[..., :3], np.where(mass < LEAST, 0.0, 0.25 + 0.75 * scaled), cell, cell)
    if tokens <= 32 * block:
        for border in range(block, tokens, block):
            axes.axvline(border, color=RULE, linewidth=0.4)
            axes.axhline(border, color=RULE, linewidth=0.4)
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(False)
    axes.set_title(f"layer {entry['layer']} ({ATTENTION[entry['kind']]}), head {entry['head']}", fontsize=8.5)


def _image(axes: Axes, colour: Sequence[float] | np.ndarray, alpha: np.ndarray, down: int, right: int) -> None:
    """Cells of `down` x `right` tokens in one colour or one each, as opaque as `alpha` says."""
    pixels = np.empty((*alpha.shape, 4))
    pixels[..., :3], pixels[..., 3] = colour, alpha
    extent = (0.0, float(right * alpha.shape[1]), float(down * alpha.shape[0]), 0.0)
    axes.imshow(pixels, extent=extent, interpolation="nearest")
