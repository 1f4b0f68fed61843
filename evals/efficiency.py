"""Efficiency: time, memory and tokens per second by context length, MoBA against full attention on one checkpoint.

Three parts, on text of the corpus that is one document of each length:

    attention  the attention of one layer, from queries, keys and values to its output, as the paper of MoBA times it
               (arXiv 2502.13189, section 3.4): forward, and forward + backward
    model      the whole model with its loss, the same two passes; no optimizer and no exchange of gradients
    decoding   one token of a causal model after a text of the length

The theoretical speed-up is the ratio of floating-point operations, counted as in training (train/flops.py). All ranks
of a layout measure together and the slowest counts; pipelines have a schedule of their own in training and are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table
    from neomoba_dist.config import ModelConfig

TITLE = "Efficiency"
PARTS = {"attention": "attention of one layer", "model": "whole model", "decoding": "decoding"}
SHORT = {"moba": "MoBA", "sliding_window": "window", "full": "full"}  # in the heads of narrow columns
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens, and how often each pass is timed."""

    lengths: list[int]
    repetitions: int


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    parser.add_argument(
        "--repetitions", type=positive_int, default=3, metavar="N", help="of each pass; the least counts (default: 3)"
    )


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Check layout and lengths. Raises EvalError."""
    from evals.efficiency_passes import NEW_TOKENS

    pp, trained = subject.model.mesh["pp"].size, subject.config.phase.sequence_length
    if pp > 1:
        raise EvalError(f"--pp {pp}: efficiency times passes of whole models; give --pp 1, or --tp and --cp")
    if subject.model.stage.text_head is not None:
        raise EvalError(
            f"--tasks efficiency: {subject.checkpoint} is fine-tuned on whole texts and has no loss of tokens; give a "
            "checkpoint of pre-training"
        )
    lengths = args.lengths or [trained // part for part in (4, 2, 1) if trained // part > 1]
    new = NEW_TOKENS + 1 if subject.config.model.causal else 0
    subject.check_length("--lengths", lengths[-1] + new)
    return Plan(lengths, args.repetitions)


def run(subject: Subject, plan: Plan) -> Result:
    """Time every pass at every length."""
    import torch

    from evals.bench._processor import processor_name
    from evals.efficiency_passes import measure, passes, timed_layer

    config, mesh, on_gpu = subject.config.model, subject.model.mesh, subject.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(subject.device)
    for todo in passes(subject, plan.lengths[0], 1):  # libraries, kernels and buffers that stay
        measure(subject, todo)
    rows = []
    for length in progress(plan.lengths, len(plan.lengths), "efficiency", "length", disable=mesh.rank != 0):
        for todo in passes(subject, length, plan.repetitions):
            limit = theory(config, todo.part, length, subject.attentions[0], subject.config.data.mlm_probability)
            row = {"part": todo.part, "pass": todo.name, "length": length, "theory": limit}
            rows.append({**row, **measure(subject, todo)})
    threads = torch.get_num_threads()
    alone = mesh["world"].size * threads == 1
    return {
        "rows": rows,
        "attentions": subject.attentions,
        "block_size": config.moba_block_size,
        "top_k": config.moba_top_k,
        "timed_layer": timed_layer(subject.model.stage),
        "repetitions": plan.repetitions,
        "clock": "CUDA events" if on_gpu else "CPU time" if alone else "wall time",
        "threads": threads,
        "machine": torch.cuda.get_device_name() if on_gpu else processor_name(),
    }


def theory(config: ModelConfig, part: str, length: int, kind: str, mlm_probability: float) -> float | None:
    """Operations of full attention over those of the model's own `kind`; None where there is but one."""
    import torch

    from neomoba_dist.train.flops import attention_pairs, step_flops, window_pairs

    if kind == "full":
        return None
    n = torch.tensor([length])
    if part == "attention":
        own = window_pairs(n, config) if kind == "sliding_window" else attention_pairs(n, config, False)
        return attention_pairs(n, config, True) / own
    counted = length - 1 if config.causal else round(length * mlm_probability)
    full, own = (step_flops(config, n, counted, everywhere) for everywhere in (True, False))
    if part == "decoding":  # of one token more
        more = [step_flops(config, n + 1, counted + 1, everywhere) for everywhere in (True, False)]
        full, own = more[0] - full, more[1] - own
    return full / own


def lines(result: Result) -> Iterator[dict[str, Any]]:
    """One entry per pass, length and kind of attention; times in seconds, of the fastest repetition and the median."""
    for row in result["rows"]:
        seconds = {kind: min(times) for kind, times in row["seconds"].items()}
        for kind in result["attentions"]:
            if kind not in seconds:
                continue
            gain = seconds["full"] / seconds[kind] if kind != "full" and "full" in seconds else None
            tokens = 1 if row["part"] == "decoding" else row["length"]
            yield {
                **{key: row[key] for key in ("part", "pass", "length")},
                "attention": kind,
                "least": seconds[kind],
                "median": median(row["seconds"][kind]),
                "tokens_per_second": tokens / seconds[kind],
                "bytes": row["bytes"][kind],
                "speedup": gain,
                "theory": None if kind == "full" else row["theory"],
            }


def scores(result: Result) -> Scores:
    """The numbers of the table, an entry per part, pass, length and kind of attention."""
    keys = {"least": "seconds", "tokens_per_second": "tokens_per_second", "bytes": "bytes", "speedup": "speedup"}
    return {
        "_".join(["efficiency", line["part"], line["pass"].replace(" + ", "_").replace(" ", "_"), line["attention"],
                  str(line["length"])]): {
            **{name: line[key] for key, name in keys.items() if line[key] is not None},
            "samples": result["repetitions"],
        }
        for line in lines(result)
    }  # fmt: skip


def csv(result: Result) -> Table:
    """speed.csv: one line per part, pass, length and kind of attention; `topk` counts the query's own block."""
    head = ["part", "length", "impl", "block", "topk", "sparsity", "pass", "ms_median", "ms_min", "tokens_per_s",
            "peak_mem_bytes", "speedup_vs_full", "theory", "device"]  # fmt: skip
    block, top_k = result["block_size"], result["top_k"]
    table = [head]
    for line in lines(result):
        sparse = line["attention"] == "moba"
        sparsity = f"{max(0.0, 1 - block * top_k / line['length']):.4f}" if sparse else ""
        cells: list[Any] = [line["part"], line["length"], line["attention"]]
        cells += [block, top_k, sparsity] if sparse else ["", "", ""]
        cells += [line["pass"], 1e3 * line["median"], 1e3 * line["least"], line["tokens_per_second"], line["bytes"]]
        cells += [line["speedup"], line["theory"], result["device"]]
        table.append(["" if cell is None else str(cell) for cell in cells])
    return table


def figure(result: Result) -> Figure:
    """Time, speed-up and memory by length; a row for each part."""
    from evals.efficiency_plot import efficiency_figure

    return efficiency_figure(list(lines(result)), PARTS)


def table(result: Result) -> Table:
    """Kinds of attention side by side."""
    kinds = result["attentions"]
    by_place = {(line["part"], line["pass"], line["length"], line["attention"]): line for line in lines(result)}
    units = {
        "least": ("ms", lambda x: f"{1e3 * x:.4g}"),
        "tokens_per_second": ("tokens/s", lambda x: f"{x:,.0f}"),
        "bytes": ("MiB", lambda x: f"{x / MIB:,.1f}"),
    }
    head = ["part and pass", "tokens"]
    head += [f"{SHORT[kind]}, {unit}" for unit, _ in units.values() for kind in kinds]
    head += ["speed-up", "in theory"] * (len(kinds) > 1)
    found = [head]
    for row in result["rows"]:
        place = (row["part"], row["pass"], row["length"])
        cells = [f"{PARTS[row['part']]}, {row['pass']}", f"{row['length']:,}"]
        for key, (_, form) in units.items():
            for kind in kinds:
                line = by_place.get((*place, kind))
                cells.append(form(line[key]) if line else "-" if row["part"] == "decoding" else "does not fit")
        if len(kinds) > 1:
            own = by_place.get((*place, kinds[0]), {})
            cells += [f"{x:.2f} x" if (x := own.get(key)) else "-" for key in ("speedup", "theory")]
        found.append(cells)
    return found


def caption(result: Result) -> str:
    """What was measured, and how."""
    layout = " x ".join(f"{axis} {size}" for axis, size in result["layout"].items() if size > 1)
    where = f"{result['machine']}" + (f", {layout}, the slowest rank" if layout else "")
    threads = "" if result["device"].startswith("cuda") else f", {result['threads']} thread(s) a rank"
    sparse = f"blocks of {result['block_size']:,} tokens, top {result['top_k']} with the query's own"
    return (
        f"Text of {result['data']} as one document. Attention of one layer: layer {result['timed_layer']}, from "
        "queries, keys and values to the output; whole model: with its loss, without optimizer"
        + ("; decoding: one token more after the text. " if result["objective"] == "clm" else ". ")
        + f"MoBA: {sparse}. The least of {result['repetitions']} repetitions (decoding: of more tokens), "
        f"{result['clock']} on {where}{threads}, {result['dtype']}. Memory: the most that a pass holds above weights "
        "and inputs; decoding: keys and values of all layers. In theory: the ratio of floating-point operations."
    )
