"""`python -m evals run`: load the checkpoint once, check all tasks, run them, write what rank 0 has to write."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from evals.cli import EvalError, print_table
from evals.load import Layout, load_subject
from evals.plots import save_png
from evals.results import header, write_csv, write_result
from evals.samples import write_run, write_samples
from evals.tasks import TASKS, Result, load_task
from neomoba_dist.parallel.comm import on_first_rank

JOURNAL = "progress.jsonl"  # in the output folder; see work.py


def run(args: argparse.Namespace, command: str) -> int:
    """The command, on every rank of the launch. Raises EvalError, ConfigError, DataError or CheckpointError."""
    subject = load_subject(
        args.checkpoint,
        args.data,
        args.device,
        layout=Layout(args.tp, args.pp, args.cp, args.ep),
        tokenizer=args.tokenizer,
        needs_corpus=any(TASKS[name].needs_corpus for name in args.tasks),
        batch_tokens=args.batch_tokens,
        journal=args.output / JOURNAL,
        prefill=args.attn_prefill,
        decode=args.attn_decode,
    )
    if subject.config.model.num_decoder_layers:
        refuse_decoder_tasks(args.tasks)
    plans = {name: load_task(name).prepare(subject, args) for name in args.tasks}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(
            f"--output {args.output}: no folder can be made there ({error.strerror}); give another"
        ) from error
    results, scores, when = {}, {}, datetime.now(UTC)
    for name, plan in plans.items():
        task, began = load_task(name), time.monotonic()
        measured = task.run(subject, plan)
        samples = measured.pop("sample_lines", [])
        result = {**header(subject, name, command, time.monotonic() - began, args.limit), **measured}
        results[name], scores[name] = result, task.scores(result)
        on_first_rank(subject.workers.mesh, partial(write, args.output, result, samples, when))
    on_first_rank(subject.workers.mesh, partial(write_run, args.output, results, scores, when))
    return 0


def refuse_decoder_tasks(names: Iterable[str]) -> None:
    """Raises EvalError for a task that does not run encoder-decoders."""
    fit = [name for name, entry in TASKS.items() if entry.encoder_decoder]
    for name in names:
        if name not in fit:
            raise EvalError(
                f"--tasks {name}: does not run an encoder-decoder (neomoba.model.objective span_corruption); give "
                f"--tasks {','.join(fit)}"
            )


def write(folder: Path, result: Result, samples: list[dict], when: datetime) -> None:
    """Everything about one task: JSON, CSV, picture and samples into `folder`, the table to the terminal."""
    name = result["task"]
    task = load_task(name)
    path = write_result(folder, result)
    save_png(task.figure(result), path.with_suffix(".png"))
    write_csv(path.with_suffix(".csv"), task.csv(result))
    if samples:
        write_samples(folder, name, samples, when)
    print_table(task.table(result))
    if result["partial"]:
        print(f"PARTIAL: --limit {result['partial']}; not to be compared with whole runs")
    print(f"{name}: {path}, {path.with_suffix('.png')}", flush=True)
