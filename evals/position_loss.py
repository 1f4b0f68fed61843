"""Position-wise loss: the mean loss of a token by its position in the document (MoBA, arXiv 2502.13189, appendix A.1).

Which texts a range of positions counts, --rule:

    rows      rows of validation that one document fills completely: every position then comes from the same texts, so
              that a curve over positions shows the use of context and not a change of texts
    present   documents cut to --length; a range counts every token that lies in it (the paper's table 3)
    complete  the same; a range counts only documents that cover all of it

CLM: loss of the next token. MLM: with "rows" the fixed masks of validation; with the other two one of every
--mask-stride tokens is masked, in as many passes, so that every token is scored once.

Legend: R texts, L positions, B buckets, I intervals between all borders that are asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.cli import EvalError, positive_int
from evals.tasks import ATTENTION
from evals.work import Item

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table
    from neomoba_dist.data.batch import Batch

TITLE = "Loss by position"
RULES = ("rows", "present", "complete")
FIRST_OCTAVE = 16  # the first bucket of "log2": fewer positions would be noise


@dataclass(frozen=True)
class Text:
    """One text to score: an item of the task. `batch` builds its inputs; `length`: its positions."""

    key: tuple[object, ...]
    length: int
    build: Callable[[], list[Batch]]


@dataclass(frozen=True)
class Plan:
    """Which texts are measured and how positions are grouped. `edges` int64 [B + 1], from 0 to the length.

    rows: numbers of the rows of validation, where the rule is "rows".
    """

    texts: list[Text]
    length: int
    edges: np.ndarray
    border: int | None
    rule: str
    trailing: int
    rows: list[int]

    @property
    def cuts(self) -> np.ndarray:
        """All borders between which losses are summed, int64 [I + 1]."""
        asked = [*self.edges.tolist(), self.border or 0, max(0, self.length - self.trailing)]
        return np.unique(np.array(asked, dtype=np.int64))


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
    parser.add_argument(
        "--rows", type=positive_int, default=64, metavar="N", help="most rows, or documents (default: 64)"
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="rows",
        help="which texts a range of positions counts (default: rows filled by one document)",
    )
    parser.add_argument(
        "--mask-stride",
        type=positive_int,
        default=8,
        metavar="N",
        help="MLM, rules present and complete: one of N tokens is masked in each of N passes (default: 8)",
    )
    parser.add_argument(
        "--trailing",
        type=positive_int,
        metavar="N",
        help="last positions of full-length texts, averaged apart (default: a sixteenth of --length)",
    )
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
    """Choose the texts. Raises EvalError."""
    trained = subject.config.phase.sequence_length
    length = args.length or trained
    border = args.border or (trained if trained < length else None)
    if border and border >= length:
        raise EvalError(f"--border {border}: must be less than --length {length}")
    longest = int(subject.corpus.document_lengths.max())
    if length > longest and args.rule != "present":
        raise EvalError(
            f"--length {length}: no document of {subject.corpus.folder} is that long; its longest has {longest} "
            "tokens, give at most that or another corpus with --data"
        )
    subject.check_length("--length", length)
    most = min(args.rows, args.limit or args.rows)
    if args.rule == "rows":
        texts, rows = validation_rows(subject, length, most)
    else:
        texts, rows = documents(subject, length, most, args.mask_stride), []
    trailing = min(args.trailing or max(1, length // 16), length)
    return Plan(texts, length, bucket_edges(args.buckets, length), border, args.rule, trailing, rows)


def validation_rows(subject: Subject, length: int, most: int) -> tuple[list[Text], list[int]]:
    """Rows that one document fills, in the fixed order of validation, and their numbers."""
    from neomoba_dist.data.build import BatchBuilder
    from neomoba_dist.data.pack import Packing
    from neomoba_dist.data.rows import Rows, Source
    from neomoba_dist.data.validation import VALIDATION_SEED

    config = subject.config
    settings, seed = replace(config.data, token_dropout=0.0), VALIDATION_SEED
    packing = Packing(length=length, max_documents=settings.max_documents_per_row)
    source = Rows([Source(subject.corpus)], packing, seed)
    builder = BatchBuilder(subject.corpus, settings, objective=config.model.objective, length=length, seed=seed)
    plan = source.readers[0].plan
    parts = (plan.part(number) for number in range(len(plan.part_ends)))
    full = np.concatenate([part.piece_length[part.row_starts[:-1]] == length for part in parts])
    order = source.row_ids(np.arange(source.total))
    rows = order[full[order]][:most].tolist()
    if not rows:
        raise EvalError(f"--length {length}: no row of {subject.corpus.folder} is filled by one document; give less")

    def build(row: int) -> Callable[[], list[Batch]]:
        return lambda: [builder.build(source.read(np.array([row])))]

    data = subject.corpus.fingerprint
    return [Text((data, length, row), length, build(row)) for row in rows], rows


def documents(subject: Subject, length: int, most: int, stride: int) -> list[Text]:
    """The first documents of the corpus with at least two tokens, the longest first, cut to `length`."""
    corpus, mask = subject.corpus, subject.corpus.special.mask
    causal = subject.config.model.causal
    if not causal and mask is None:
        raise EvalError("position_loss: the tokenizer has no mask token; leave position_loss out of --tasks")
    lengths = np.asarray(corpus.document_lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    chosen = np.argsort(-lengths, kind="stable")[:most]

    def build(number: int) -> Callable[[], list[Batch]]:
        def batches() -> list[Batch]:
            tokens = corpus.tokens_at(int(starts[number]), min(length, int(lengths[number])))
            if causal:
                return [batch_with_labels(tokens, np.append(tokens[1:], -100))]
            assert mask is not None  # an MLM's tokenizer has one, checked where the corpus is opened
            ordinary, place = corpus.ordinary[tokens], np.arange(len(tokens))
            parts = []
            for rest in range(stride):
                masked = (place % stride == rest) & ordinary
                inputs, labels = np.where(masked, mask, tokens), np.where(masked, tokens, -100)
                parts.append(batch_with_labels(inputs, labels))
            return parts

        return batches

    return [
        Text((corpus.fingerprint, length, "document", int(n), stride), min(length, int(lengths[n])), build(int(n)))
        for n in chosen
        if lengths[n] > 1
    ]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one document each as one Batch."""
    import torch

    borders = torch.tensor([0, *(len(batch.input_ids) for batch in batches)]).cumsum(0)
    return replace(
        batches[0],
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        cu_seqlens=borders.to(torch.int32),
        row_ids=torch.arange(1),
    )


def batch_with_labels(inputs: np.ndarray, labels: np.ndarray) -> Batch:
    """One document as a Batch."""
    import torch

    from neomoba_dist.generate.stage import batch_of

    return replace(batch_of([inputs.tolist()], "cpu"), labels=torch.from_numpy(labels.astype(np.int64)))


def bucket_edges(buckets: int | str, length: int) -> np.ndarray:
    """Borders of the position ranges, int64 [B + 1]: equal widths, or "log2": 0, 16, 32, 64, ..., length."""
    if buckets == "log2":
        powers = [1 << i for i in range(length.bit_length()) if FIRST_OCTAVE <= 1 << i < length]
        return np.array([0, *powers, length], dtype=np.int64)
    return np.unique(np.linspace(0, length, int(buckets) + 1).round().astype(np.int64))


def text_sums(subject: Subject, plan: Plan, attention: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums of the losses in nats, float64; numbers of counted tokens), [R, I], with one kind of attention."""
    from neomoba_dist.data.batch import IGNORE_LABEL

    subject.model.use(attention)
    cuts = plan.cuts

    def measure(texts: list[Text]) -> list[dict[str, Any]]:
        borders = np.cumsum([0, *(text.length for text in texts)])
        losses, counts = np.zeros(borders[-1]), np.zeros(borders[-1], dtype=np.int64)
        for batches in zip(*(text.build() for text in texts), strict=True):
            batch = joined(batches)
            scores, _ = subject.model.log_likelihoods(batch)
            losses -= scores.double().numpy()
            counts += (batch.labels != IGNORE_LABEL).numpy()
        found = []
        for first, last in pairwise(borders.tolist()):
            inside = [slice(min(first + start, last), min(first + end, last)) for start, end in pairwise(cuts.tolist())]
            loss = [float(losses[part].sum()) for part in inside]
            found.append({"loss": loss, "count": [int(counts[part].sum()) for part in inside]})
        return found

    named = cuts.tolist()
    items = [Item(subject.key("position_loss", named, *text.key), text.length, text) for text in plan.texts]
    found = subject.workers.run(f"position_loss, {attention}", items, measure)
    return (
        np.array([entry["loss"] for entry in found], dtype=np.float64),
        np.array([entry["count"] for entry in found], dtype=np.int64),
    )


def run(subject: Subject, plan: Plan) -> Result:
    """The curves of all kinds of attention over the same texts and masks."""
    curves, overall, ranges = {}, {}, {}
    cuts, lengths = plan.cuts, np.array([text.length for text in plan.texts])
    for attention in subject.attentions:
        sums_RI, counts_RI = text_sums(subject, plan, attention)

        def estimate(
            start: int, end: int, *, whole: bool = False, sums_RI: Any = sums_RI, counts_RI: Any = counts_RI
        ) -> Estimate:
            inside = (cuts[:-1] >= start) & (cuts[1:] <= end)
            sums, counts = sums_RI[:, inside].sum(1), counts_RI[:, inside].sum(1)
            kept = lengths >= end if whole else counts > 0 if plan.rule == "present" else slice(None)
            return Estimate.of(sums[kept], counts[kept])

        overall[attention] = estimate(0, plan.length)
        curve: dict[str, Any] = {"all": overall[attention].to_dict()}
        if plan.border:
            within, beyond = estimate(0, plan.border), estimate(plan.border, plan.length)
            curve |= {"within": within.to_dict(), "beyond": beyond.to_dict()}
            if len(within.influence) == len(beyond.influence):
                curve["beyond_minus_within"] = beyond.minus(within).to_dict()
        trailing = estimate(plan.length - plan.trailing, plan.length, whole=True)
        curve["trailing"] = {"last": plan.trailing, "documents": len(trailing.influence), **trailing.to_dict()}
        curve["perplexity"] = _number(float(np.exp(overall[attention].mean)))
        edges = list(pairwise(plan.edges.tolist()))
        ranges[attention] = [estimate(start, end, whole=plan.rule == "complete") for start, end in edges]
        curve["buckets"] = [
            {"start": start, "end": end, "documents": len(found.influence), **found.to_dict()}
            for (start, end), found in zip(edges, ranges[attention], strict=True)
        ]
        curves[attention] = curve
    keys = {"all": "mean", "within": "within", "beyond": "beyond"}
    summary = {name: {keys[key]: curve[key]["loss"] for key in keys if key in curve} for name, curve in curves.items()}
    result: Result = {"length": plan.length, "rows": len(plan.texts), "border": plan.border, "summary": summary}
    result |= {"rule": plan.rule, "curves": curves}
    if {"moba", "full"} <= set(overall):
        result["moba_minus_full"] = overall["moba"].minus(overall["full"]).to_dict()
    if len(ranges) > 1:  # the same texts: the error of the difference is smaller than that of either curve
        own, full = ranges[subject.attentions[0]], ranges["full"]
        result["difference"] = [
            {"start": start, "end": end, **one.minus(other).to_dict()}
            for (start, end), one, other in zip(edges, own, full, strict=True)
        ]
    return result


def scores(result: Result) -> Scores:
    """Mean losses in nats and perplexity, one entry per kind of attention."""
    return {
        f"position_loss_{name}": {
            "loss": curve["all"]["loss"],
            "loss_stderr": curve["all"]["standard_error"],
            "trailing_loss": curve["trailing"]["loss"],
            "perplexity": curve["perplexity"],
            "samples": result["rows"],
        }
        for name, curve in result["curves"].items()
    }


def csv(result: Result) -> Table:
    """poswise.csv: one line per kind of attention and range of positions, then the differences."""
    head = ["attention", "start", "end", "documents", "tokens", "mean", "stderr", "rule"]
    curves = {name: curve["buckets"] for name, curve in result["curves"].items()}
    if "difference" in result:
        curves[f"{next(iter(curves))}_minus_full"] = result["difference"]
    return [head] + [
        [name, *(str(bucket.get(key, "")) for key in ("start", "end", "documents", "tokens", "loss", "standard_error")),
         result["rule"]]
        for name, buckets in curves.items()
        for bucket in buckets
    ]  # fmt: skip


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
        if all("beyond_minus_within" in curve for curve in result["curves"].values()):
            rows += [("difference", "beyond_minus_within")]
    curves = result["curves"]
    last = next(iter(curves.values())).get("trailing")
    if last:
        rows.append((f"last {last['last']:,} of {result['length']:,}", "trailing"))
    lines = [[label, *(_with_error(curve[key]) for curve in curves.values())] for label, key in rows]
    return [["loss, nats per token", *(ATTENTION[name] for name in curves)], *lines]


def _with_error(entry: dict[str, Any]) -> str:
    if entry["loss"] is None:
        return "not counted"
    text = f"{entry['loss']:.4f}".replace("-", "\N{MINUS SIGN}")
    return text if entry["standard_error"] is None else f"{text} ± {entry['standard_error']:.4f}"


def caption(result: Result) -> str:
    """How the curves were made."""
    rule = result.get("rule", "rows")
    masks = "of the next token"
    if result["objective"] == "mlm":
        masks = "on the fixed masks of validation" if rule == "rows" else "of every token, masked in turn"
    many, data = f"{result['rows']}", f"of {result['data']}"
    texts = {
        "rows": f"{many} rows of {result['length']:,} tokens {data}, each filled by one document, so that all "
        "positions come from the same texts.",
        "present": f"{many} documents {data}; a range counts every token that lies in it.",
        "complete": f"{many} documents {data}; a range counts the documents that cover all of it.",
    }
    return (
        f"Mean cross entropy {masks}, by the number of tokens of the same document that stand before the position. "
        + texts[rule]
        + (" Below: the difference, text by text." if "difference" in result else "")
        + " ± and bands: standard error with texts as units."
    )
