"""The rows that every validation runs on, always the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.builders import builder_of
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.job import Job
from neomoba_dist.data.rows import Rows, Source
from neomoba_dist.data.stream import make_packing

VALIDATION_SEED = 0


def validation_batches(
    corpus: Corpus,
    settings: DataConfig,
    *,
    objective: str,
    sequence_length: int,
    micro_batch_size: int,
    rows: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    pairs: bool = False,
    job: Job | None = None,
) -> list[Batch]:
    """The fixed rows and masks on which every validation runs: this rank's share, the same number on each rank.

    The first `rows` rows (all, if the corpus has fewer) of epoch 0 under a seed of their own, whatever the run's seed
    and layout. pairs: for next-sentence prediction. Where rows do not fill all micro-batches, rows of padding fill up:
    they count nothing. Nothing is dropped out. The ranks of `job` make the row plan together. DataError for a damaged
    row, whatever `on_corrupt` says.
    """
    settings = replace(settings, token_dropout=0.0)
    cache = None if settings.cache is None else Path(settings.cache)
    source = Rows([Source(corpus)], make_packing(settings, sequence_length), VALIDATION_SEED, cache=cache, job=job)
    build = builder_of(objective, pairs)
    builder = build(corpus, settings, objective=objective, length=sequence_length, seed=VALIDATION_SEED)
    rows = min(rows, source.total)
    batches = []
    step = micro_batch_size * dp_size
    for first in range(dp_rank * micro_batch_size, -(-rows // step) * step, step):
        positions = np.arange(first, first + micro_batch_size)
        block = source.read(source.row_ids(np.where(positions < rows, positions, 0)))
        for problem in block.damaged.values():
            raise DataError(problem)
        batches.append(builder.build(block.without(positions >= rows)))
    return batches
