"""The picture of `efficiency`: time, speed-up with the theoretical curve, and memory by context length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from evals.plots import COLOURS, MUTED, style
from evals.tasks import ATTENTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = dict[str, Any]
DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")  # of a part's passes, in order


def efficiency_figure(found: Sequence[Line], titles: Mapping[str, str]) -> Figure:
    """A row of panels for each part: time of a pass, speed-up over full attention, memory.

    found: the entries of efficiency.lines. titles: of the parts, in order.
    """
    parts = [part for part in titles if any(line["part"] == part for line in found)]
    compared = len({line["attention"] for line in found}) > 1
    with style():
        figure = Figure(figsize=(11.0, 0.8 + 2.45 * len(parts)), layout="constrained")
        panels = figure.subplots(len(parts), 2 + compared, squeeze=False)
        for part, (time, *gain, memory) in zip(parts, panels, strict=True):
            here = [line for line in found if line["part"] == part]
            names = [f"{titles[part]}: time", *["speed-up over full attention"] * compared]
            names.append("cache" if part == "decoding" else "peak memory")
            _draw(time, here, "least", 1e3)
            time.set(yscale="log", ylabel="milliseconds")
            time.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            time.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            time.yaxis.set_minor_locator(NullLocator())
            for axes in gain:
                _speedup(axes, here)
            _draw(memory, here, "bytes", 2.0**-20)
            memory.set(ylabel="MiB")
            memory.set_ylim(bottom=0)
            for axes, title in zip((time, *gain, memory), names, strict=True):
                axes.set_title(title)
                _length_axis(axes, sorted({line["length"] for line in here}))
        for axes in panels[-1]:
            axes.set_xlabel("context length, tokens")
        figure.legend(handles=_legend(found, compared), loc="outside upper right", ncols=5)
        return figure


def _legend(found: Sequence[Line], compared: bool) -> list[Line2D]:
    """One for all panels: colours are kinds of attention, dashes passes."""
    kinds = [Line2D([], [], color=COLOURS[kind], label=ATTENTION[kind]) for kind in COLOURS if _has(found, kind)]
    names = [" or ".join(dict.fromkeys(name for name in column if name)) for column in _passes(found)]
    passes = [
        Line2D([], [], color=MUTED, linestyle=dash, label=name) for dash, name in zip(DASHES, names, strict=False)
    ]
    return [*kinds, *passes, *[Line2D([], [], color=MUTED, linestyle=":", label="speed-up in theory")] * compared]


def _has(found: Sequence[Line], kind: str) -> bool:
    return any(line["attention"] == kind for line in found)


def _passes(found: Sequence[Line]) -> list[tuple[str, ...]]:
    """The passes of each place of DASHES, over all parts."""
    parts = dict.fromkeys(line["part"] for line in found)
    names = [list(dict.fromkeys(line["pass"] for line in found if line["part"] == part)) for part in parts]
    return list(zip_longest(*names, fillvalue=""))


def _draw(axes: Axes, found: Sequence[Line], key: str, factor: float) -> None:
    """A curve for each pass and kind of attention."""
    passes = list(dict.fromkeys(line["pass"] for line in found))
    for kind in dict.fromkeys(line["attention"] for line in found):
        for dash, name in zip(DASHES, passes, strict=False):
            curve = [line for line in found if (line["attention"], line["pass"]) == (kind, name)]
            values = [factor * line[key] for line in curve]
            axes.plot(
                [line["length"] for line in curve], values, dash, marker="o", markersize=3, color=COLOURS[kind],
                label=f"{ATTENTION[kind]}, {name}",
            )  # fmt: skip


def _speedup(axes: Axes, found: Sequence[Line]) -> None:
    """Measured speed-up of each pass; the ratio of operations dotted."""
    own = [line for line in found if line["speedup"] is not None]
    for dash, name in zip(DASHES, dict.fromkeys(line["pass"] for line in own), strict=False):
        curve = [line for line in own if line["pass"] == name]
        axes.plot(
            [line["length"] for line in curve], [line["speedup"] for line in curve], dash, marker="o", markersize=3,
            color=COLOURS[curve[0]["attention"]],
        )  # fmt: skip
    limits = {line["length"]: line["theory"] for line in found if line["theory"]}
    axes.plot(list(limits), list(limits.values()), ":", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} x"))


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x % 1024 == 0 else f"{x:,.0f}"))
