"""Batches of pairs for tests, and the loss that they have in plain torch."""

from dataclasses import replace
from itertools import pairwise

import torch

from neomoba_dist.data.batch import Batch
from neomoba_dist.model.neobert import NeoBERT
from tests.models import tiny_batch

PAIRS = {"type_vocab_size": 2, "next_sentence_prediction": True}  # of a tiny_model


def pair_batch(seed: int, rows: int = 1) -> Batch:
    """`tiny_batch` with its documents as pairs; of the three in a row 0 to 3 have a label, by seed and row."""
    batch = tiny_batch(seed, rows)
    generator = torch.Generator().manual_seed(seed)
    types, labels = torch.zeros_like(batch.input_ids), torch.full_like(batch.input_ids, -100)
    for number, (start, stop) in enumerate(pairwise(batch.cu_seqlens[:-1].tolist())):
        types[start + (stop - start) // 2 : stop] = 1
        if number % 3 < (seed + number // 3) % 4:
            labels[start] = int(torch.randint(2, (1,), generator=generator))
    return replace(batch, token_type_ids=types, next_sentence_labels=labels, num_pairs=int((labels >= 0).sum()))


def with_counts(batches: list[Batch]) -> list[Batch]:
    """The batches as one update: the counts of all, and the places of pairs."""
    counts = {name: sum(getattr(batch, name) for batch in batches) for name in ("num_valid", "num_pairs")}
    return [replace(batch, **counts).with_counted() for batch in batches]  # type: ignore[arg-type]


def pair_loss(model: NeoBERT, batch: Batch) -> torch.Tensor:
    """A micro-batch's part of the loss: both means."""
    tokens, pairs, _ = model(batch)[0]
    return tokens / batch.num_valid + pairs / batch.num_pairs
