"""Figures: loss by position, needle heat maps, training curves. One quiet style, for PNG files and for the report.

The report embeds SVG whose ink, grid and paper colours are CSS variables, so that figures follow the reader's light or
dark scheme; the colours of the data are chosen to read on both.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from evals.tasks import ATTENTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evals.runs import Run
    from evals.tasks import Result

INK, MUTED, RULE, PAPER = "#23272e", "#68707b", "#dfe3e8", "#fdfdfe"
BLUE, ORANGE = "#4189b8", "#cf7a35"
DARK = {INK: "#e4e7eb", MUTED: "#9aa3ad", RULE: "#353b43", PAPER: "#16191d"}
NAMES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
COLOURS = {"moba": BLUE, "sliding_window": BLUE, "full": ORANGE}
HEAT = LinearSegmentedColormap.from_list("heat", ["#edf1f4", "#a9cbdd", "#3a7ca8", "#123c5a"])
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
LEAST_SPAN = 0.4  # nats on the axis of loss by position: noise should look like noise
MOST_POINTS = 600  # of a curve; more are averaged in groups of neighbouring steps
STYLE: Any = {  # matplotlib types its keys as one long Literal
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlepad": 8.0,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "neomoba",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


@contextmanager
def style() -> Iterator[None]:
    """The style, for as long as a figure is drawn or saved."""
    with mpl.rc_context(STYLE):
        yield


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure at 160 dots per inch."""
    with style():
        figure.savefig(path, dpi=160)


def data_uri(figure: Figure) -> str:
    """The figure as an SVG data URI that follows the reader's colour scheme."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no doctype: it names an address
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", FONTS).replace('"DejaVu Sans"', FONTS)
    for colour, name in NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    light = "".join(f"--{NAMES[colour]}:{colour};" for colour in NAMES)
    dark = "".join(f"--{NAMES[colour]}:{value};" for colour, value in DARK.items())
    css = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    text = re.sub(r"(<svg[^>]*>)", lambda match: match[1] + css, text, count=1)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode("utf-8")).decode("ascii")


def position_loss_figure(result: Result) -> Figure:
    """Loss over positions with bands of one standard error, a dashed line at the border; below it the difference."""
    difference = result.get("difference", [])
    with style():
        figure = Figure(figsize=(7.6, 5.0 if difference else 3.4), layout="constrained")
        axes, *lower = figure.subplots(
            2 if difference else 1, squeeze=False, sharex=True, height_ratios=([2.0, 1.0] if difference else None)
        )[:, 0]
        for name, curve in result["curves"].items():
            dashed = "--" if name == "full" and len(result["curves"]) > 1 else "-"  # both show where they coincide
            _band(axes, curve["buckets"], dashed, color=COLOURS[name], label=ATTENTION[name])
        low, high = axes.get_ylim()
        spare = max(0.0, LEAST_SPAN - (high - low)) / 2
        axes.set_ylim(low - spare, high + spare)
        axes.set_ylabel("loss, nats per token")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, ncols=2)
        for panel in lower:
            own = next(iter(result["curves"]))
            panel.axhline(0, color=COLOURS["full"], linewidth=1.2, linestyle="--")
            _band(panel, difference, "-", color=COLOURS[own])
            panel.set_ylabel(f"{ATTENTION[own]}\n\N{MINUS SIGN} full attention")
        if result["border"]:
            _mark(axes, result["border"], f"{result['border']:,}")
        _position_axis(axes, [bucket["start"] for bucket in curve["buckets"]] + [result["length"]])
        (lower or [axes])[-1].set_xlabel("position in the document, tokens")
        return figure


def _band(axes: Axes, buckets: Sequence[dict[str, Any]], dashes: str, **look: Any) -> None:
    """Losses of ranges of positions, at their middles, with bands of one standard error."""
    buckets = [bucket for bucket in buckets if bucket["loss"] is not None]
    centre = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
    loss = np.array([bucket["loss"] for bucket in buckets])
    error = np.array([bucket["standard_error"] or 0.0 for bucket in buckets])
    axes.plot(centre, loss, dashes, marker="o", markersize=3, **look)
    axes.fill_between(centre, loss - error, loss + error, color=look["color"], alpha=0.16, linewidth=0)


def _position_axis(axes: Axes, edges: Sequence[int]) -> None:
    """Positions from 0 to the length, on a logarithmic axis where the ranges are octaves."""
    if edges[-1] - edges[-2] > 2 * (edges[1] - edges[0]):  # octaves
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(edges[1:]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(edges[1] / 2.5, edges[-1])
    else:
        axes.set_xlim(0, edges[-1])
        axes.xaxis.set_major_locator(FixedLocator(np.linspace(0, edges[-1], 9).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def needle_figure(result: Result) -> Figure:
    """Whole keys by length, chance dashed; then accuracy among ten digits, depth down and length to the right, the
    palest colour is chance."""
    curves, lengths, depths = result["curves"], result["lengths"], result["depths"]
    with style():
        width = 1.9 + (len(curves) + 1) * max(2.4, 0.72 * len(lengths))
        figure = Figure(figsize=(width, 1.2 + max(1.6, 0.36 * len(depths))), layout="constrained")
        keys, *panels = figure.subplots(1, 1 + len(curves))
        places = range(len(lengths))
        for name, curve in curves.items():
            exact = [100 * entry["exact"] for entry in curve["by_length"]]
            keys.plot(places, exact, marker="o", markersize=3.5, color=COLOURS[name], label=ATTENTION[name])
        chance = 100 * result["chance"] ** result["digits"]
        keys.axhline(chance, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=f"chance, {chance:.3g} %")
        keys.set(ylim=(-3, 103), xlim=(-0.3, len(lengths) - 0.7), xlabel="prompt length, tokens")
        keys.set_ylabel(f"keys of {result['digits']} digits found, %")
        keys.set_xticks(places, [f"{length:,}" for length in lengths])
        keys.legend()
        scale = mpl.colors.Normalize(result["chance"], 1.0, clip=True)
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            for cell in curve["cells"]:
                x, y = lengths.index(cell["length"]), depths.index(cell["depth"])
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=HEAT(scale(cell["accuracy"])), lw=0))
                shade = "#ffffff" if scale(cell["accuracy"]) > 0.5 else "#24303a"
                axes.text(x, y, f"{100 * cell['accuracy']:.0f}", ha="center", va="center", color=shade, fontsize=8.5)
            axes.set_title(ATTENTION[name])
            axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5), xlabel="prompt length, tokens")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, labelleft=axes is panels[0])
        panels[0].set_ylabel("depth of the needle, %")
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, HEAT), ax=panels, aspect=14, pad=0.02, fraction=0.08)
        bar.outline.set_visible(False)
        bar.set_ticks([result["chance"], 0.5, 1.0], labels=[f"{100 * result['chance']:.0f}", "50", "100"])
        bar.set_label(f"digits right, % (chance {100 * result['chance']:.0f})")
        return figure


def bar_figure(bars: Sequence[tuple[str, float, float | None]]) -> Figure:
    """(label, value, standard error) as horizontal bars, the first on top, each with its number."""
    with style():
        figure = Figure(figsize=(7.6, 0.9 + 0.3 * len(bars)), layout="constrained")
        axes: Axes = figure.subplots()
        for y, (_, value, error) in enumerate(bars):
            axes.barh(y, value, height=0.62, color=BLUE, xerr=error, ecolor=MUTED)
            end = value + (error or 0.0)
            axes.annotate(f"{value:.3f}", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(False, axis="y")
        axes.set_xlabel("score")
        return figure


def loss_figure(runs: Sequence[Run], entropy: float | None) -> Figure:
    """Training and validation loss over all phases; the unigram entropy as a dotted line."""
    with style():
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes: Axes = figure.subplots()
        for i, (run, start) in enumerate(with_starts(runs)):
            tokens, loss = thinned(*run.series("loss", start))
            axes.plot(tokens, loss, color=BLUE, linewidth=1.2, label=None if i else "training")
            tokens, loss = run.series("validation_loss", start)
            axes.plot(tokens, loss, color=ORANGE, marker="o", markersize=3.5, label=None if i else "validation")
        if entropy is not None:
            axes.axhline(entropy, color=MUTED, linewidth=1.0, linestyle=":", label="unigram entropy")
        token_axis(axes, runs, names=True)
        axes.set_ylabel("loss, nats per token")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        return figure


def curve_figure(runs: Sequence[Run], key: str, label: str) -> Figure:
    """One quantity of metrics.jsonl over all phases; a logarithmic axis where it spans much."""
    with style():
        figure = Figure(figsize=(3.3, 2.2), layout="constrained")
        axes: Axes = figure.subplots()
        curves = [thinned(*run.series(key, start)) for run, start in with_starts(runs)]
        for tokens, values in curves:
            axes.plot(tokens, values, color=BLUE, linewidth=1.1)
        values = np.concatenate([values for _, values in curves])
        if key == "grad_norm" and len(values) and values.max() > 30 * values.min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            plain = FuncFormatter(lambda y, _: f"{y:g}")
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else plain)
        token_axis(axes, runs, names=False)
        axes.set_ylabel(label)
        return figure


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of groups of neighbouring points, so that at most MOST_POINTS remain."""
    group = max(1, math.ceil(len(x) / MOST_POINTS))
    if group == 1:
        return x, y
    starts = np.arange(0, len(x), group)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def with_starts(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    """Each run with the tokens seen before it."""
    start = 0
    for run in runs:
        yield run, start
        start += run.tokens


def token_axis(axes: Axes, runs: Sequence[Run], *, names: bool) -> None:
    """Tokens on the x axis; a thin line where a phase begins, with its name."""
    total = sum(run.tokens for run in runs)
    axes.set_xlim(0, total)
    axes.xaxis.set_major_locator(MaxNLocator(6 if names else 4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens seen in training")
    line, last = 0, -1.0
    for run, start in with_starts(runs):
        if start:
            axes.axvline(start, color=MUTED, linewidth=0.8)
        if not names:
            continue
        place = start / total
        # the name after a short phase stands one line higher
        line, last = (line + 1 if place - last < 0.15 else 0), place
        note = f"{run.config.phase.name} · {run.config.phase.sequence_length:,}"
        axes.annotate(
            note, (place, 1.0), (3, 3 + 11 * line), "axes fraction", "offset points", color=MUTED, fontsize=8.5
        )
        if (switch := run.switch) is not None:
            _mark(axes, start + switch, "full attention", right=(start + switch) / total > 0.8)


def _mark(axes: Axes, x: float, text: str, *, right: bool = False) -> None:
    """A dashed line with a small label at its foot; `right`: the label ends at the line."""
    axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (x, 0),
        (-4 if right else 4, 5),
        ("data", "axes fraction"),
        "offset points",
        ha="right" if right else "left",
        color=MUTED,
        fontsize=8.5,
    )
