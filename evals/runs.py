"""Run folders as the report reads them: config, metrics, size and layout. Needs neither torch nor the corpus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.cli import EvalError
from neomoba_dist.checkpoint.index import read_index, tensor_entries
from neomoba_dist.checkpoint.layout import complete_checkpoints, read_json
from neomoba_dist.config import Config, load_config
from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics

LAST_STEPS = 10  # the final loss is their mean
TOKEN_LOSSES = {"loss": "token_loss", "validation_loss": "validation_token_loss"}


@dataclass(frozen=True)
class Run:
    """One phase. What its folder no longer tells is None.

    steps: the entries of metrics.jsonl, see `of_tokens`. parameters: of the whole model, without padding. world_size:
    ranks.
    unigram_entropy: nats per token of the corpus that validation ran on.
    """

    folder: Path
    config: Config
    steps: list[dict[str, Any]]
    parameters: int | None
    world_size: int | None
    unigram_entropy: float | None

    @property
    def tokens(self) -> int:
        """Tokens of all its steps."""
        return sum(entry["tokens"] for entry in self.steps)

    @property
    def seconds(self) -> float:
        """Wall time of all its steps, without validation, checkpoints and start."""
        return sum(entry["step_seconds"] for entry in self.steps)

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last steps that have a finite one."""
        last = [entry["loss"] for entry in self.steps if math.isfinite(entry["loss"])][-LAST_STEPS:]
        return sum(last) / len(last) if last else math.nan

    @property
    def validation_loss(self) -> float | None:
        """The last one."""
        found = [entry["validation_loss"] for entry in self.steps if "validation_loss" in entry]
        return found[-1] if found else None

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps: the first ones are slow."""
        return float(np.median([entry["tokens_per_second"] for entry in self.steps]))

    @property
    def full_share(self) -> float:
        """Share of the steps whose MoBA layers ran full attention."""
        return sum(entry["full_attention"] for entry in self.steps) / len(self.steps)

    @property
    def switch(self) -> int | None:
        """Tokens of this run after which its MoBA layers change to full attention for good; None if they do not."""
        full = [entry["full_attention"] for entry in self.steps]
        moba_steps = full.index(True) if True in full else len(full)
        if not 0 < moba_steps < len(full) or not all(full[moba_steps:]):
            return None
        return sum(entry["tokens"] for entry in self.steps[:moba_steps])

    def series(self, key: str, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens seen, values), float64, of the steps that have a finite `key`. start: tokens seen before this run."""
        seen = start + np.cumsum([entry["tokens"] for entry in self.steps], dtype=np.float64)
        values = np.array([entry.get(key, math.nan) for entry in self.steps], dtype=np.float64)
        kept = np.isfinite(values)
        return seen[kept], values[kept]

    def layer_series(self, key: str, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens seen [N], values [N, layers]), float64, of the steps that have the list `key`, finite throughout."""
        seen = start + np.cumsum([entry["tokens"] for entry in self.steps], dtype=np.float64)
        found = [(x, entry[key]) for x, entry in zip(seen, self.steps, strict=True) if entry.get(key)]
        tokens, values = np.array([x for x, _ in found]), np.array([v for _, v in found], dtype=np.float64)
        kept = np.isfinite(values).all(1) if found else np.zeros(0, dtype=bool)
        return tokens[kept], values[kept] if found else values.reshape(0, 0)


def of_tokens(entry: dict[str, Any]) -> dict[str, Any]:
    """A step whose losses are those of its tokens alone: with next-sentence prediction they have another part."""
    return {**entry, **{key: entry[of] for key, of in TOKEN_LOSSES.items() if of in entry}}


def read_run(folder: Path) -> Run:
    """A run folder of launch/pretrain.py. Raises EvalError, ConfigError or CheckpointError."""
    config_file, metrics_file = folder / "config.json", folder / METRICS_FILE
    for file in (config_file, metrics_file):
        if not file.is_file():
            raise EvalError(f"--run {folder}: {file.name} is missing; give an --output_dir of launch/pretrain.py")
    steps = [of_tokens(entry) for entry in read_metrics(metrics_file)]
    if not steps:
        raise EvalError(f"--run {folder}: {METRICS_FILE} holds no step yet; let the run make one")
    config = load_config(config_file)
    parameters = world_size = None
    checkpoints = complete_checkpoints(folder)
    if checkpoints:
        tensors = tensor_entries(read_index(checkpoints[-1]), checkpoints[-1])
        parameters = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith("model."))
        world_size = read_json(checkpoints[-1] / "trainer.json").get("world_size")
    corpus = Path(config.data.validation or config.data.train) / INDEX_FILE
    entropy = CorpusIndex.from_file(corpus).unigram_entropy if corpus.is_file() else None
    return Run(folder, config, steps, parameters, world_size, entropy)
