"""From a checked configuration to a ready trainer, in one fixed order."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.corpus import Corpus, open_corpus
from neomoba_dist.data.index import MUCH_UNKNOWN
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.validation import validation_batches
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Corpora:
    """The opened shards, checked against the model."""

    train: list[Source]
    validation: Corpus | None

    def lines(self) -> list[str]:
        """One line for each corpus: its size, and how much of its text the tokenizer did not know."""
        named = [(source.corpus.key, source.corpus) for source in self.train]
        if self.validation is not None:
            named.append((self.validation.key, self.validation))
        found = {}
        for key, corpus in named:
            warning = "warning: " if corpus.index.largest_unknown_share > MUCH_UNKNOWN else ""
            found[key, corpus.name] = (
                f"{warning}{key}: {corpus.name}, {corpus.documents} documents, {corpus.tokens} tokens, "
                f"{corpus.index.unknown}"
            )
        return list(found.values())


def open_corpora(config: Config) -> Corpora:
    """Open what `neomoba.data` names. Raises DataError, in one line; called before any process group exists."""
    cache = None if config.data.cache is None else Path(config.data.cache)

    @functools.cache  # a mixture may take several subsets of one corpus
    def opened(place: str, key: str) -> Corpus:
        corpus = open_corpus(place, key, cache)
        corpus.require_vocabulary(config.model.vocab_size)
        return corpus

    train = [
        Source(opened(entry.place, "neomoba.data.train"), entry.weight, entry.min_length)
        for entry in config.data.sources
    ]
    validation = config.data.validation
    return Corpora(train, None if validation is None else opened(validation, "neomoba.data.validation"))


def build_stream(
    config: Config, plan: BatchPlan, train: list[Source], dp_rank: int, mesh: Mesh | None = None
) -> UpdateStream:
    """The training rows of one data-parallel rank; with a `mesh` its ranks agree on what is damaged.

    Raises DataError, in one line.
    """

    def agree(found: np.ndarray) -> np.ndarray:
        assert mesh is not None
        mine = torch.from_numpy(found.astype(np.int32)).to(mesh.device)
        return all_reduce(mine, mesh, "world", op="max").cpu().numpy().astype(bool)

    return UpdateStream(
        train,
        config.data,
        accumulation=plan.gradient_accumulation_steps,
        seed=config.phase.seed,
        pin_memory=mesh is not None and mesh.device.type == "cuda",
        agree=None if mesh is None else agree,
        **_row_settings(config, plan, dp_rank),
    )


def build_validation(config: Config, plan: BatchPlan, corpus: Corpus | None, dp_rank: int) -> list[Batch]:
    """The fixed validation micro-batches of one data-parallel rank; none without a validation corpus."""
    if corpus is None:
        return []
    settings = _row_settings(config, plan, dp_rank)
    return validation_batches(corpus, config.data, rows=config.log.validation_rows, **settings)


def _row_settings(config: Config, plan: BatchPlan, dp_rank: int) -> dict[str, Any]:
    """How rows are shared out, the same for training and validation."""
    return {
        "objective": config.model.objective,
        "sequence_length": config.phase.sequence_length,
        "micro_batch_size": plan.micro_batch_size,
        "dp_rank": dp_rank,
        "dp_size": plan.data_parallel_size,
    }
