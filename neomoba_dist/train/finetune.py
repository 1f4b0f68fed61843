"""Fine-tuning of one task with one seed: the training loop of pretraining, judged by the task's metrics.

What it adds: outputs of a whole split on all ranks, early stopping, and the weights of the best validation, which are
exported at once and stand in the engine again after `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neomoba_dist.checkpoint.layout import step_folder
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config
from neomoba_dist.config.text_tasks import TEXT_TASKS
from neomoba_dist.data.examples import Examples, ExampleStream
from neomoba_dist.model.text_heads import SCORE_UNIT
from neomoba_dist.parallel.comm import all_gather_objects
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.bad_steps import StepJudge
from neomoba_dist.train.engines import FlatEngine
from neomoba_dist.train.health import Watchdog
from neomoba_dist.train.text_scores import scores
from neomoba_dist.train.trainer import Trainer


def split_outputs(engine: FlatEngine, examples: Examples) -> np.ndarray:
    """The head's outputs for every document of a split, in order, on every rank: float32 [n, K].

    All data-parallel ranks make as many forwards, each with its share of the examples.
    """
    mesh, micro = engine.mesh, engine.plan.micro_batch_size
    dp, total = mesh["dp"], len(examples)
    found: list[tuple[int, np.ndarray]] = []
    for start in range(0, total, micro * dp.size):
        first = start + dp.index * micro
        numbers = range(first, min(first + micro, total))
        outputs = engine.outputs(examples.batch(numbers if numbers else [0])).numpy()
        if numbers:
            found.append((first, outputs))
    together = [entry for part in all_gather_objects(found, mesh, "dp") for entry in part]
    return np.concatenate([outputs for _, outputs in sorted(together, key=lambda entry: entry[0])])


def split_labels(examples: Examples, task: str) -> np.ndarray:
    """Classes int64 [n] or scores float64 [n]; of contrastive pairs one number per group."""
    if TEXT_TASKS[task].embeds:
        return np.zeros(len(examples))
    labels = np.array([example.label for example in examples.examples])
    return labels if TEXT_TASKS[task].labels else labels * SCORE_UNIT


class FinetuneTrainer(Trainer):
    """validation: the splits by name; the mean of all their metrics decides what is best. Empty: the last is best."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: FlatEngine,
        stream: ExampleStream,
        validation: Mapping[str, Examples],
        output: Path,
        watchdog: Watchdog | None = None,
    ) -> None:
        super().__init__(config, mesh, engine, stream, (), output, watchdog)
        assert config.finetune.tasks is not None
        # the loss of a few examples, most of them easy, is no measure of a fault
        self.judge = StepJudge(replace(config.health, spike_sigma=0.0))
        self.splits, self.task = validation, config.finetune.tasks
        self.outputs_of = lambda examples: split_outputs(engine, examples)
        self.best: dict[str, Any] = {"step": 0, "mean": -np.inf, "scores": {}, "since": 0}

    def resume(self, reader: CheckpointReader, *, allow_data_change: bool = False) -> None:
        super().resume(reader, allow_data_change=allow_data_change)
        self.best = dict(reader.trainer()["best"])
        self._judge_patience()

    def run(self, last_step: int, *, profile: bool = False) -> None:
        """Train; at the end of the run take the best weights back."""
        super().run(last_step, profile=profile)
        if self.best["step"] and (self.finished or self.step == self.config.phase.steps):
            self.engine.load(CheckpointReader(step_folder(self.output, self.best["step"], export=True)), moments=False)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "best": self.best}

    def _validate(self) -> dict[str, float]:
        task = TEXT_TASKS[self.task]
        found: dict[str, float] = {}
        for name, examples in self.splits.items():
            measured = scores(task, self.outputs_of(examples), split_labels(examples, self.task))
            found |= {f"validation_{label(metric, name)}": value for metric, value in measured.items()}
        mean = float(np.mean(list(found.values()))) if found else 0.0
        if not found or mean > self.best["mean"]:
            self.best = {"step": self.step, "mean": mean, "scores": found, "since": 0}
            self.saver.save(self.step, self._state(), checkpoint=False, export=True)
        else:
            self.best = {**self.best, "since": self.best["since"] + 1}
        self._judge_patience()
        return found

    def _judge_patience(self) -> None:
        patience = self.config.finetune.patience
        self.finished = patience > 0 and self.best["since"] >= patience


def label(metric: str, split: str) -> str:
    """A metric's name with that of its split, where a task has several: accuracy, accuracy_mismatched."""
    return f"{metric}_{split.removeprefix('dev_')}" if split.startswith("dev_") else metric


def write_predictions(path: Path, task: str, examples: Examples, guesses: Sequence[float]) -> None:
    """A file of GLUE's submission: `index` and `prediction`, classes by name, scores with three decimals in 0..5."""
    labels = TEXT_TASKS[task].labels
    lines = ["index\tprediction"]
    for example, guess in zip(examples.examples, guesses, strict=True):
        value = labels[int(guess)] if labels else f"{min(5.0, max(0.0, guess)):.3f}"
        lines.append(f"{example.index}\t{value}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
