"""Position-wise loss: the mean loss of a token by its position in the document (MoBA, arXiv 2502.13189, appendix A.1).

Only rows that one document fills completely are taken: every position then comes from the same documents, so that a
curve over positions shows the use of context and not a change of texts. A position counts the tokens of that document
that stand before it in the row. MLM: the fixed masks of validation, loss at the masked position. CLM: loss of the next
token.

Legend: R rows, L tokens in a row, B buckets.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.cli import EvalError, positive_int, progress
from evals.tasks import ATTENTION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Table
    from neomoba_dist.data.build import BatchBuilder
    from neomoba_dist.data.rows import Rows

TITLE = "Loss by position"
TOKENS_PER_FORWARD = 4096
FIRST_OCTAVE = 16  # the first bucket of "log2": fewer positions would be noise


@dataclass(frozen=True)
class Plan:
    """Which rows are measured and how positions are grouped. `edges` int64 [B + 1], from 0 to the length."""

    source: Rows
    builder: BatchBuilder
    rows: list[int]
    edges: np.ndarray
    border: int | None

    @property
    def length(self) -> int:
        """L."""
        return self.source.packing.length


@dataclass(frozen=True)
class Estimate:
    """A mean loss per token in nats with what each row adds to its error.

    influence float64 [R]: linearised ratio estimator with rows as sampling units (Cochran 1977, section 6.3); tokens of
    one row are not independent, so their number says little about the error.
    """

    tokens: int
    mean: float
    influence: np.ndarray

    @classmethod
    def of(cls, sums_R: np.ndarray, counts_R: np.ndarray) -> Estimate:
        """From each row's sum of losses and number of counted tokens."""
        total = int(counts_R.sum())
        if total == 0:
            return cls(0, float("nan"), np.full(len(sums_R), np.nan))
        mean = sums_R.sum() / total
        return cls(total, float(mean), (sums_R - mean * counts_R) / total)

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two estimates from the same rows."""
        return Estimate(0, self.mean - other.mean, self.influence - other.influence)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; null where nothing was counted, or where one row cannot show its error."""
        rows = len(self.influence)
        error = (rows / (rows - 1) * (self.influence**2).sum()) ** 0.5 if rows > 1 else float("nan")
        entry = {"loss": _number(self.mean), "standard_error": _number(float(error))}
        return entry | ({"tokens": self.tokens} if self.tokens else {})


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _buckets(text: str) -> int | str:
    return text if text == "log2" else positive_int(text)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    parser.add_argument(
        "--length", type=positive_int, metavar="N", help="tokens in a row (default: the run's sequence_length)"
    )
    parser.add_argument("--rows", type=positive_int, default=64, metavar="N", help="most rows (default: 64)")
    parser.add_argument(
        "--buckets",
        type=_buckets,
        default=16,
        metavar="N|log2",
        help="equal ranges of positions, or octaves (default: 16)",
    )
    parser.add_argument(
        "--border",
        type=positive_int,
        metavar="N",
        help="also compare positions before and from N on, for example the "
        "length of the phase before (default: the run's sequence_length where --length is more)",
    )


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Choose the rows: full ones, in the fixed order of validation. Raises EvalError."""
    from neomoba_dist.data.build import BatchBuilder
    from neomoba_dist.data.pack import Packing
    from neomoba_dist.data.rows import Rows, Source
    from neomoba_dist.data.validation import VALIDATION_SEED

    config = subject.config
    trained = config.phase.sequence_length
    length = args.length or trained
    border = args.border or (trained if trained < length else None)
    if border and border >= length:
        raise EvalError(f"--border {border}: must be less than --length {length}")
    settings, seed = replace(config.data, token_dropout=0.0), VALIDATION_SEED
    packing = Packing(length=length, max_documents=settings.max_documents_per_row)
    source = Rows([Source(subject.corpus)], packing, seed)
    builder = BatchBuilder(subject.corpus, settings, objective=config.model.objective, length=length, seed=seed)
    plan = source.readers[0].plan
    full = plan.piece_length[plan.row_starts[:-1]] == length
    order = source.row_ids(np.arange(source.total))
    rows = order[full[order]][: args.rows].tolist()
    if not rows:
        longest = int(subject.corpus.document_lengths.max())
        raise EvalError(
            f"--length {length}: no document of {subject.corpus.folder} is that long; its longest has {longest} "
            "tokens, give at most that or another corpus with --data"
        )
    return Plan(source, builder, rows, bucket_edges(args.buckets, length), border)


def bucket_edges(buckets: int | str, length: int) -> np.ndarray:
    """Borders of the position ranges, int64 [B + 1]: equal widths, or "log2": 0, 16, 32, 64, ..., length."""
    if buckets == "log2":
        powers = [1 << i for i in range(length.bit_length()) if FIRST_OCTAVE <= 1 << i < length]
        return np.array([0, *powers, length], dtype=np.int64)
    return np.unique(np.linspace(0, length, int(buckets) + 1).round().astype(np.int64))


def row_losses(subject: Subject, plan: Plan, attention: str) -> tuple[np.ndarray, np.ndarray]:
    """(losses float64 [R, L] in nats, 0 where not counted; counted bool [R, L]) with one kind of attention."""
    import torch

    from neomoba_dist.data.batch import IGNORE_LABEL

    subject.use(attention)
    at_once = max(1, TOKENS_PER_FORWARD // plan.length)
    parts = [plan.rows[i : i + at_once] for i in range(0, len(plan.rows), at_once)]
    losses, counted = [], []
    with torch.inference_mode():
        for rows in progress(parts, len(parts), f"position_loss, {attention}", "batch"):
            batch = plan.builder.build(plan.source.read(np.array(rows)))
            losses.append(subject.model.token_losses(batch.to(subject.device)).double().cpu())
            counted.append(batch.labels != IGNORE_LABEL)
    shape = (-1, plan.length)
    return torch.cat(losses).reshape(shape).numpy(), torch.cat(counted).reshape(shape).numpy()


def run(subject: Subject, plan: Plan) -> Result:
    """The curves of all kinds of attention over the same rows and masks."""
    curves, overall = {}, {}
    for attention in subject.attentions:
        losses_RL, counted_RL = row_losses(subject, plan, attention)

        def estimate(start: int, end: int, losses_RL: Any = losses_RL, counted_RL: Any = counted_RL) -> Estimate:
            return Estimate.of(losses_RL[:, start:end].sum(1), counted_RL[:, start:end].sum(1))

        overall[attention] = estimate(0, plan.length)
        curve: dict[str, Any] = {"all": overall[attention].to_dict()}
        if plan.border:
            within, beyond = estimate(0, plan.border), estimate(plan.border, plan.length)
            curve |= {"within": within.to_dict(), "beyond": beyond.to_dict()}
            curve["beyond_minus_within"] = beyond.minus(within).to_dict()
        curve["buckets"] = [
            {"start": int(start), "end": int(end), **estimate(start, end).to_dict()}
            for start, end in zip(plan.edges, plan.edges[1:], strict=False)
        ]
        curves[attention] = curve
    keys = {"all": "mean", "within": "within", "beyond": "beyond"}
    summary = {name: {keys[key]: curve[key]["loss"] for key in keys if key in curve} for name, curve in curves.items()}
    result: Result = {"length": plan.length, "rows": len(plan.rows), "border": plan.border, "summary": summary}
    result["curves"] = curves
    if "moba" in overall:
        result["moba_minus_full"] = overall["moba"].minus(overall["full"]).to_dict()
    return result


def figure(result: Result) -> Figure:
    """Loss over positions, one line per kind of attention."""
    from evals.plots import position_loss_figure

    return position_loss_figure(result)


def table(result: Result) -> Table:
    """Mean losses, with their standard errors."""
    border = result["border"]
    rows = [("all positions", "all")]
    if border:
        rows += [(f"positions < {border:,}", "within"), (f"positions ≥ {border:,}", "beyond")]
        rows += [("difference", "beyond_minus_within")]
    curves = result["curves"]
    lines = [[label, *(_with_error(curve[key]) for curve in curves.values())] for label, key in rows]
    return [["loss, nats per token", *(ATTENTION[name] for name in curves)], *lines]


def _with_error(entry: dict[str, Any]) -> str:
    if entry["loss"] is None:
        return "not counted"
    text = f"{entry['loss']:.4f}".replace("-", "\N{MINUS SIGN}")
    return text if entry["standard_error"] is None else f"{text} ± {entry['standard_error']:.4f}"


def caption(result: Result) -> str:
    """How the curves were made."""
    masks = "on the fixed masks of validation" if result["objective"] == "mlm" else "of the next token"
    return (
        f"Mean cross entropy {masks}, by the number of tokens of the same document that stand before the position. "
        f"{result['rows']} rows of {result['length']:,} tokens of {result['data']}, each filled by one document, so "
        "that all positions come from the same texts. ± and bands: standard error with rows as units."
    )
