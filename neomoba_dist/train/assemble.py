"""From a checked configuration to a ready trainer, in one fixed order."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.check import check_corpora
from neomoba_dist.data.corpus import Corpus, read_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import MUCH_UNKNOWN
from neomoba_dist.data.job import Job
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.validation import validation_batches
from neomoba_dist.parallel.comm import all_gather_objects, all_reduce
from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Corpora:
    """What the indexes of the corpora say, checked against the model; `check` looks at the shards.

    longest: length in tokens of the longest documents that get into a row; None: of any.
    """

    train: list[Source]
    validation: Corpus | None
    cache: Path | None
    longest: int | None = None

    def check(self, mesh: Mesh) -> None:
        """Look at every shard once, the ranks of the mesh together. AgreedError, in one line."""
        check_corpora(self._all(), self.cache, data_job(mesh))

    def fingerprints(self) -> dict[str, str]:
        """What the data are, by the name of the corpus."""
        return {f"fingerprint of {corpus.name}": corpus.fingerprint for corpus in self._all()}

    def _all(self) -> list[Corpus]:
        corpora = [source.corpus for source in self.train] + ([] if self.validation is None else [self.validation])
        return list(dict.fromkeys(corpora))

    def lines(self) -> list[str]:
        """One line for each corpus: its size, and how much of its text the tokenizer did not know."""
        named = [(source.corpus.key, source.corpus) for source in self.train]
        if self.validation is not None:
            named.append((self.validation.key, self.validation))
        found = {}
        for key, corpus in named:
            warning = "warning: " if corpus.index.largest_unknown_share > MUCH_UNKNOWN else ""
            left_out = ""
            if self.longest is not None and (count := int((corpus.document_lengths > self.longest).sum())):
                left_out = f", {count} of them left out: longer than neomoba.phase.sequence_length {self.longest}"
            found[key, corpus.name] = (
                f"{warning}{key}: {corpus.name}, {corpus.documents} documents{left_out}, {corpus.tokens} tokens, "
                f"{corpus.index.unknown}"
            )
        return list(found.values())


def data_job(mesh: Mesh) -> Job:
    """The ranks of the mesh, for what one of them can do for all."""
    return Job(mesh.rank, mesh["world"].size, lambda value: all_gather_objects(value, mesh, "world"))


def open_corpora(config: Config) -> Corpora:
    """Read the indexes that `neomoba.data` names. Raises DataError, in one line, the same on every rank."""
    cache = None if config.data.cache is None else Path(config.data.cache)
    locations = {entry.location for entry in config.data.sources} | {config.data.validation}

    @functools.cache  # a mixture may take several subsets of one corpus
    def opened(location: str, key: str) -> Corpus:
        corpus = read_corpus(location, key, cache, corpora=len(locations))
        corpus.require_vocabulary(config.model.vocab_size)
        if corpus.has_loss_spans and not config.model.causal:
            raise DataError(
                f"{key}: {corpus.name} holds prompts and responses, and neomoba.model.objective is "
                f"{config.model.objective}; start from a decoder with --init_from, or set neomoba.model.objective=clm"
            )
        return corpus

    train = [
        Source(opened(entry.location, "neomoba.data.train"), entry.weight, entry.min_length)
        for entry in config.data.sources
    ]
    validation = config.data.validation
    longest = config.phase.sequence_length if config.data.packing == "whole" else None
    held_out = None if validation is None else opened(validation, "neomoba.data.validation")
    return Corpora(train, held_out, cache, longest)


def build_stream(
    config: Config, plan: BatchPlan, train: list[Source], dp_rank: int, mesh: Mesh | None = None
) -> UpdateStream:
    """The training rows of one data-parallel rank; the ranks of a `mesh` plan them together, and agree on damage.

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
        job=None if mesh is None else data_job(mesh),
        **_row_settings(config, plan, dp_rank),
    )


def build_validation(config: Config, plan: BatchPlan, corpus: Corpus | None, mesh: Mesh) -> list[Batch]:
    """This rank's fixed validation micro-batches, planned by all ranks together; none without a validation corpus."""
    if corpus is None:
        return []
    settings = _row_settings(config, plan, mesh["dp"].index)
    rows = config.log.validation_rows
    return validation_batches(corpus, config.data, rows=rows, job=data_job(mesh), **settings)


def _row_settings(config: Config, plan: BatchPlan, dp_rank: int) -> dict[str, Any]:
    """How rows are shared out, the same for training and validation."""
    return {
        "objective": config.model.objective,
        "pairs": config.model.next_sentence_prediction,
        "sequence_length": config.phase.sequence_length,
        "micro_batch_size": plan.micro_batch_size,
        "dp_rank": dp_rank,
        "dp_size": plan.data_parallel_size,
    }
