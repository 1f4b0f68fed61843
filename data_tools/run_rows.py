"""The rows that a step of a training run consists of, found from its run folder alone, on any machine.

The rows of a run do not depend on the number of ranks, so neither a skipped step nor a resume on other ranks matters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from neomoba_dist.checkpoint.layout import CheckpointError, complete_checkpoints, read_json, step_of
from neomoba_dist.config import BatchPlan, Config, ConfigError, load_config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import Tokenizer
from neomoba_dist.train.assemble import build_stream, open_corpora
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics


class RunStep(NamedTuple):
    """first, rows: place of the step's rows in the run, and their number. entry: the step's in the log, if it ended."""

    config: Config
    first: int
    rows: int
    entry: dict[str, Any] | None


def find_step(run: Path, step: int) -> RunStep:
    """Where the rows of a step lie; also of the one that was under way when the run ended. DataError, in one line."""
    if not (run / "config.json").is_file() or not (run / METRICS_FILE).is_file():
        raise DataError(f"--run {run}: not the folder of a training run (config.json and {METRICS_FILE}); see --help")
    try:
        config = load_config(run / "config.json")
    except ConfigError as error:
        raise DataError(str(error)) from error
    if config.finetune.tasks is not None:
        raise DataError(f"--run {run}: a run of fine-tuning, which has no shards; its examples are in the task's files")
    log = read_metrics(run / METRICS_FILE)
    last = log[-1]["step"] if log else 0
    if step > last + 1:
        raise DataError(f"--rows-of-step {step}: the log of {run} ends with step {last}; give 1 to {last + 1}")
    usual = config.phase.tokens_per_update // config.phase.sequence_length
    ends = {0: 0} | {entry["step"]: entry.get("rows", entry["step"] * usual) for entry in log}
    ends.setdefault(last + 1, ends[last] + usual)
    entry = next((entry for entry in log if entry["step"] == step), None)
    return RunStep(config, ends[step - 1], ends[step] - ends[step - 1], entry)


def read_rows(run: Path, step: int, found: RunStep) -> tuple[list[Batch], Tokenizer]:
    """The rows of the step as training saw them, one Batch each, in their order, and the tokenizer. DataError."""
    # a damaged row is shown as the padding that `on_corrupt` "skip" makes of it, and named
    data = replace(found.config.data, validation=None, prefetch=0, on_corrupt="skip")
    config = replace(found.config, data=data)
    try:
        train = open_corpora(config).train
    except DataError as error:
        raise DataError(f"{error}; if the corpus has moved, say where in {run / 'config.json'}") from error
    plan = BatchPlan(
        world_size=1,
        data_parallel_size=1,
        micro_batch_size=1,
        gradient_accumulation_steps=found.rows,
        rows_per_update=found.rows,
        tokens_per_update=found.rows * config.phase.sequence_length,
    )
    stream = build_stream(config, plan, train, 0)
    fingerprint = _fingerprint(run, step)
    if fingerprint not in (None, stream.state_dict()["fingerprint"]):
        names = ", ".join(source.corpus.name for source in train)
        raise DataError(
            f"neomoba.data.train: {names} is not the data of step {step} (fingerprint "
            f"{stream.state_dict()['fingerprint']}, the run's {fingerprint}); put that data back"
        )
    stream.rows_consumed = found.first
    batches, _ = next(iter(stream))
    return batches, train[0].corpus.tokenizer()


def _fingerprint(run: Path, step: int) -> str | None:
    """Of the data that a step was trained on, by the first checkpoint from it on, or the newest."""
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        return None
    folder = next((folder for folder in checkpoints if step_of(folder) >= step), checkpoints[-1])
    try:
        return str(read_json(folder / "trainer.json")["data"]["fingerprint"])
    except CheckpointError as error:
        raise DataError(str(error)) from error
