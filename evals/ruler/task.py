"""The task `ruler`: greedy answers to prepared samples on any layout, written as RULER's own predictions, scored."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError
from evals.ruler.prepare import prepare as prepare_sets
from evals.ruler.prepare import read_manifest, read_set
from evals.ruler.request import Request
from evals.ruler.request import add_arguments as add_request_arguments
from evals.ruler.score import effective, number, score_folder, score_table, shares, write_predictions
from evals.ruler.sets import RULER_TASKS
from evals.samples import sample_line
from evals.work import Item, ItemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table

TITLE = "RULER"


@dataclass(frozen=True)
class Plan:
    """folder: of prepared samples, whose sets are `manifest`. output: of predictions."""

    folder: Path
    manifest: dict[str, Any]
    lengths: list[int]
    names: list[str]
    limit: int | None
    output: Path


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options; --lengths, --samples and --seed are common to several tasks."""
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR",
        help="samples of `python -m evals prepare ruler` (default: prepare them in OUTPUT/prepared)",
    )  # fmt: skip
    add_request_arguments(parser)


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Prepare the samples on one rank, where they are not. Raises EvalError."""
    from neomoba_dist.parallel.comm import on_first_rank

    if not subject.config.model.causal:
        raise EvalError(
            "ruler: its answers are generated, and this checkpoint is a masked language model; evaluate it with needle"
        )
    names = args.tasks["ruler"] or list(RULER_TASKS)
    for name in names:
        if name not in RULER_TASKS:
            raise EvalError(f"--tasks ruler:{name}: no such task of RULER; choose from: {', '.join(RULER_TASKS)}")
    folder = args.prepared or args.output / "prepared"
    if args.prepared is None:
        request = Request.of(args, folder, subject.tokenizer, names)
        on_first_rank(subject.workers.mesh, partial(prepare_sets, request))
    manifest = read_manifest(folder)
    lengths = args.lengths or sorted({int(place.split("/")[0]) for place in manifest})
    subject.check_length("--lengths", lengths[-1])
    wanted = [manifest[f"{n}/{name}"] for n in lengths for name in names if f"{n}/{name}" in manifest]
    if any(each["tokenizer"] != subject.tokenizer.sha256 for each in wanted):
        raise EvalError(
            f"--prepared {folder}: made for another tokenizer, so that its samples have other lengths; prepare them "
            "again with the model's own"
        )
    if len({each["fit"] for each in wanted}) > 1:
        raise EvalError(f"--prepared {folder}: its sets mix --fit exact and --fit nvidia; use one of them")
    return Plan(folder, manifest, lengths, names, args.limit, args.output / "ruler")


def run(subject: Subject, plan: Plan) -> Result:
    """Answers and scores of all sets."""
    from neomoba_dist.parallel.comm import on_first_rank

    attention = subject.attentions[0]
    subject.model.use(attention)
    written: list[dict[str, Any]] = []
    for length in plan.lengths:
        for name in plan.names:
            samples = read_set(plan.folder, length, name, plan.manifest)[: plan.limit]
            found = answers(subject, name, samples, f"ruler {length} {name}")
            file = plan.output / str(length) / f"{name}.jsonl"
            on_first_rank(subject.workers.mesh, partial(write_predictions, file, samples, found))
            written += sample_lines(name, length, samples, found)
    facts = plan.manifest[f"{plan.lengths[0]}/{plan.names[0]}"]
    return {
        "prefill": attention,
        "decode": subject.model.decode,
        **{key: facts[key] for key in ("fit", "wording", "wording_sha256", "seed")},
        **scored(subject, plan),
        "sample_lines": written,
    }


def scored(subject: Subject, plan: Plan) -> Result:
    """The scores of the predictions, read by rank 0 and known to all."""
    from neomoba_dist.parallel.comm import all_gather_objects

    mesh = subject.workers.mesh
    found = score_folder(plan.output, plan.lengths, plan.names) if mesh.rank == 0 else {}
    return all_gather_objects(found, mesh, "world")[0]


def answers(subject: Subject, name: str, samples: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """{"text": the answer} or {"error": reason} of every sample."""
    from neomoba_dist.generate.stage import GenerationError

    tokenizer, task = subject.tokenizer, RULER_TASKS[name]
    head, end = tokenizer.document_borders
    stop = end[-1] if end else None

    def measure(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = [head + ids for ids in tokenizer.encode_batch([s["input"] + s["answer_prefix"] for s in batch])]
        try:
            found = subject.model.generate(prompts, task.generated, stop)
        except GenerationError as error:
            raise ItemError(str(error)) from error
        return [
            {"text": restored(tokenizer, tokenizer.decode(ids), sample["outputs"])}
            for ids, sample in zip(found, batch, strict=True)
        ]

    items = [
        Item(
            subject.key("ruler", task.generated, tokenizer.sha256, sample["input"], sample["answer_prefix"]),
            len(head) + sample["length"],
            sample,
        )
        for sample in samples
    ]
    return subject.workers.run(what, items, measure)


def restored(tokenizer: Any, text: str, references: list[str]) -> str:
    """The answer with the references as they were written: some tokenizers put spaces around hyphens."""
    for reference in references:
        spelt = tokenizer.decode(tokenizer.encode(reference))
        if spelt != reference and spelt.strip():
            text = text.replace(spelt, reference)
    return text


def sample_lines(
    name: str, length: int, samples: list[dict[str, Any]], found: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """In lm-eval's form; the prompts themselves stand in the prepared data."""
    task = RULER_TASKS[name]
    return [
        sample_line(
            f"ruler_{length}_{name}",
            number,
            {"length": length, "task": name, "index": number},
            sample["input"] + sample["answer_prefix"],
            sample["outputs"],
            result.get("text", ""),
            {"string_match": shares(task.metric, result.get("text", ""), sample["outputs"])},
            {"max_gen_toks": task.generated, "do_sample": False},
        )
        for number, (sample, result) in enumerate(zip(samples, found, strict=True))
    ]


def scores(result: Result) -> Scores:
    """lm-eval's entries of results."""
    return {
        f"ruler_{entry['length']}_{entry['task']}": {
            "string_match": entry["score"] / 100,
            "string_match_stderr": None if entry["standard_error"] is None else entry["standard_error"] / 100,
            "samples": entry["samples"],
        }
        for entry in result["scores"]
    }


def csv(result: Result) -> Table:
    """One line per length and task."""
    keys = ("length", "task", "score", "standard_error", "samples", "empty", "failed")
    return [list(keys)] + [
        ["" if entry[key] is None else str(entry[key]) for key in keys] for entry in result["scores"]
    ]


def figure(result: Result) -> Figure:
    """Scores by task and length, and the average with the line of 85.6."""
    from evals.ruler.plots import ruler_figure

    return ruler_figure(result)


def compare(results: dict[str, Result]) -> tuple[Figure, Table]:
    """Averages by length of several checkpoints."""
    from evals.ruler.plots import average_figure

    lengths = sorted({length for result in results.values() for length in result["lengths"]})
    lines = [["average in % at tokens", *(f"{length:,}" for length in lengths), "effective"]]
    for name, result in results.items():
        found = {entry["length"]: entry["average"] for entry in result["averages"]}
        lines.append([name, *(number(found.get(length)) for length in lengths), effective(result)])
    return average_figure(results), lines


def table(result: Result) -> Table:
    """Tasks down, lengths to the right; below the averages."""
    return score_table(result)


def caption(result: Result) -> str:
    """How the scores were made."""
    kind = "every sample fills its length" if result["fit"] == "exact" else "samples as RULER's own scripts write them"
    many = sorted({entry["samples"] for entry in result["scores"]})
    count = f"{many[0]}" if len(many) == 1 else f"{many[0]} to {many[-1]}"
    failed = sum(entry["failed"] for entry in result["scores"])
    text = (
        f"RULER (arXiv 2404.06654): share of the expected strings that stand in the greedy answer (qa: any of them), "
        f"{count} samples per task and length, {kind}; prompts of {result['wording']}. Attention: {result['prefill']} "
        f"over prompts, {result['decode']} for the answer. Average weighted to long lengths "
        f"{number(result['weighted_to_long'])}, to short ones {number(result['weighted_to_short'])}. Effective length, "
        f"the longest with an average of at least {result['threshold']} %: {effective(result)}"
    )
    text += " tokens." if result["effective_length"] else "."
    return text + (f" {failed} samples could not be answered and count as empty." if failed else "")
