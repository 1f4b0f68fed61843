"""The last tables of `bench gpu`: each thing that one card must reach, with what was measured, and the other stages.

A line whose stage has left no result says "not measured", whatever the others have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evals.bench.attention import FLASH_2, SDPA
from evals.bench.moe import LARGE_GOAL, SMALL_GOAL
from evals.bench.train_step import GOALS

# forward + backward, the rival's seconds over MoBA's, by tokens
FASTEST_DENSE = {8192: 1.2, 16384: 2.5, 32768: 6.0, 65536: 12.0, 131072: 24.0}
PHASE3_SHAPE = 10.0
FLASH_MOBA = {32768: 3.4, 65536: 5.7}  # in its setting, against FlashAttention-2
MEMORY, MEMORY_TOKENS = 1.2, (32768, 131072)  # of flash attention's
MFU = {"phase1": 45.0, "phase2": 45.0, "phase3": 35.0}  # percent

Stages = Mapping[str, dict[str, Any]]


class Figure(NamedTuple):
    """What was measured: the number that the goal is about, and how a reader sees it."""

    value: float
    shown: str


def must_lines(stages_done: Stages) -> list[list[str]]:
    """What | measured | must | reached, missed or not measured: all lines in their order."""
    found = {name: next(iter(done["results"].values()), None) for name, done in stages_done.items()}
    lines = [["what", "measured", "must", "verdict"]]
    for tokens, goal in FASTEST_DENSE.items():
        figure = _speed(found.get("attention"), tokens)
        lines.append(_line(f"MoBA fwd + bwd against the fastest dense kernel, {_kilo(tokens)}", figure, goal))
    figure = _speed(found.get("phase3_shape"), None, SDPA)
    lines.append(_line("the same in phase 3's shape against SDPA", figure, PHASE3_SHAPE))
    for tokens in MEMORY_TOKENS:
        figure = _memory(found.get("attention"), tokens)
        what = f"peak memory of MoBA fwd + bwd against flash attention, {_kilo(tokens)}"
        lines.append(_line(what, figure, MEMORY, at_most=True))
    for phase, goal in MFU.items():
        figure = _mfu(found.get(phase), found.get("phase1_graphs") if phase == "phase1" else None)
        lines.append(_line(f"MFU of phase {phase[-1]}, one card", figure, goal, unit="%"))
    figure = _peer(found.get("peer"))
    lines.append(_line("tokens/s of phase 1 against transformers, both compiled", figure, GOALS["hf", "cuda"]))
    for name, goal, size in (
        ("moe", SMALL_GOAL, "8,192 x 512, 8 experts, top 2"),
        ("moe_large", LARGE_GOAL, "32,768 x 768, 32 experts, top 4"),
    ):
        lines.append(_line(f"MoE layer's time against dense, {size}", _moe(found.get(name)), goal, at_most=True))
    for tokens, goal in FLASH_MOBA.items():
        figure = _speed(found.get("flash_moba"), tokens, FLASH_2)
        lines.append(_line(f"block 128, top-k 8 against FlashAttention-2, {_kilo(tokens)}", figure, goal))
    return lines


def _line(what: str, figure: Figure | None, goal: float, *, unit: str = "x", at_most: bool = False) -> list[str]:
    must = f"{'at most' if at_most else 'at least'} {goal:g} {unit}"
    if figure is None:
        return [what, "-", must, "not measured"]
    reached = figure.value <= goal if at_most else figure.value >= goal
    return [what, figure.shown, must, "reached" if reached else "missed"]


def _kilo(tokens: int) -> str:
    return f"{tokens // 1024}k"


def _row(result: Mapping[str, Any] | None, tokens: int | None) -> dict[str, Any] | None:
    """The row of so many tokens; None: the only one."""
    rows = result["rows"] if result else []
    return next((row for row in rows if tokens in (None, row["length"])), None)


def _speed(result: Mapping[str, Any] | None, tokens: int | None, names: Sequence[str] | None = None) -> Figure | None:
    """Forward + backward against the fastest of the rivals of these names (None: of all)."""
    row = _row(result, tokens)
    seconds = {name: rival["both"] for name, rival in row["rivals"].items()} if row else {}
    seconds = {name: both for name, both in seconds.items() if names is None or name in names}
    if row is None or not seconds:
        return None
    rival, moba = min(seconds, key=seconds.__getitem__), row["moba"]["both"]
    ratio = seconds[rival] / moba
    return Figure(ratio, f"{ratio:.3f} x ({rival} {1e3 * seconds[rival]:.4g} / {1e3 * moba:.4g} ms)")


def _memory(result: Mapping[str, Any] | None, tokens: int) -> Figure | None:
    row = _row(result, tokens)
    if row is None or not row.get("full_peak_bytes"):
        return None
    moba, flash = (row[f"{kind}_peak_bytes"] for kind in ("moba", "full"))
    return Figure(moba / flash, f"{moba / flash:.3f} x ({moba / 2**30:.2f} / {flash / 2**30:.2f} GiB)")


def _mfu(result: Mapping[str, Any] | None, graphs: Mapping[str, Any] | None) -> Figure | None:
    """Of the first row: a phase that is partly full begins with its MoBA steps."""
    row = _row(result, None)
    if row is None or row["mfu"] is None:
        return None
    shown = f"{100 * row['mfu']:.2f} % ({row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.0f} GiB"
    with_graphs = _row(graphs, None)
    if with_graphs is not None:
        shown += f"; by CUDA graphs {100 * with_graphs['mfu']:.2f} %"
    return Figure(100 * row["mfu"], f"{shown})")


def _peer(result: Mapping[str, Any] | None) -> Figure | None:
    if result is None:
        return None
    found = result["comparison"]
    ours, theirs = (found["tokens_per_second"][who] for who in ("ours", "hf"))
    return Figure(found["ratio"], f"{found['ratio']:.3f} x ({ours:,.0f} / {theirs:,.0f})")


def _moe(result: Mapping[str, Any] | None) -> Figure | None:
    if result is None:
        return None
    moe, dense = (1e3 * result[f"{kind}_seconds"] for kind in ("moe", "dense"))
    return Figure(result["ratio"], f"{result['ratio']:.3f} x ({moe:.4g} / {dense:.4g} ms)")


def stage_lines(stages_done: Stages) -> list[list[str]]:
    """How each stage ended, and what those measured that the first table has not."""
    lines = [["stage", "result"]]
    for name, done in stages_done.items():
        last = next((line for line in reversed(done["last_lines"]) if line.strip()), "")
        figure = last[:90] if name == "tests" or done["status"] != "ok" else ""
        lines.append([f"{name}: {done['status']}, {done['seconds']:.0f} s", figure])
        for result in done["results"].values() if name in ROWS else ():
            lines += ROWS[name](result)
    return lines


def _million(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for row in result["forward_only"]:
        measured = f"{row['moba_forward']:.4g} s, {row['moba_forward_tflops']:.3g} TFLOP/s"
        lines.append([f"  {row['length']} tokens x {row['heads']}, MoBA forward", measured])
    return lines


def _steps(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for row in result["rows"]:
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.2f} %"
        peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.0f} GiB"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, MFU {mfu}{peak}"
        lines.append([f"  rows of {row['length']}, {row['attention']}", speed])
    return lines


def _recall(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for cells in zip(*result["cells"].values(), strict=True):
        head = cells[0]
        shown = ", ".join(f"{name} {100 * c['accuracy']:.0f} %" for name, c in zip(result["cells"], cells, strict=True))
        lines.append([f"  {head['length']} tokens, distance {head['from']}-{head['to']}", shown])
    return lines


def _tune(result: dict[str, Any]) -> list[list[str]]:
    from evals.bench.tune import cells

    rows = (cells(row) for row in result["rows"])
    return [
        [f"  {what}", f"{best}: {figures} (ms, MiB); others: {others[:60]}"] for what, best, figures, others in rows
    ]


ROWS = {"phase1_graphs": _steps, "million": _million, "recall": _recall, "tune": _tune}
