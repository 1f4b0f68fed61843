"""An update that is computed and thrown away, before the first one.

What does not fit or has a wrong shape is found at once, and not after hours at the first full-attention step. Weights,
moments, random numbers, data and the routers' biases are the same after it, to the last bit.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.data.batch import IGNORE_LABEL, Batch, EncoderTokens
from neomoba_dist.data.build import max_documents
from neomoba_dist.train.compiled import compile_summary
from neomoba_dist.train.engine import Engine

logger = logging.getLogger(__name__)


def rehearse(engine: Engine) -> None:
    """Forward, backward and reduction of an update of the largest shapes, with each kind of attention that the phase
    has; all that a step needs is then in memory. Collective over the world."""
    batches = largest_batches(engine.config, engine.plan)
    fraction = engine.config.phase.full_attention_fraction
    for full in [False] * (fraction < 1.0) + [True] * (fraction > 0.0):
        engine.set_full_attention(full)
        engine.set_step(1)
        engine.rehearse(batches)
    if engine.compiled:
        logger.info("%s", compile_summary())


def largest_batches(config: Config, plan: BatchPlan) -> Sequence[Batch]:
    """The micro-batches of a rank: rows without padding, each one document, with about as many labels as training.

    An encoder-decoder's have all tokens of the decoder as labels.
    """
    rows, length, encoder = plan.micro_batch_size, config.phase.sequence_length, None
    if config.model.num_decoder_layers:
        length = config.corrupted_lengths.decoder
        encoder = EncoderTokens(**_full_rows(config, rows, config.corrupted_lengths.encoder))
    tokens = _full_rows(config, rows, length)
    labels = tokens["input_ids"].clone()
    if config.model.objective == "mlm":
        labels[torch.arange(rows * length) % round(1 / config.data.mlm_probability) != 0] = IGNORE_LABEL
    of_pairs: dict[str, Any] = {}
    if config.model.next_sentence_prediction:
        place = torch.arange(rows * length) % length
        of_pairs = {
            "token_type_ids": (place >= length // 2).long(),
            "next_sentence_labels": torch.where(place == 0, 0, IGNORE_LABEL),
            "num_pairs": rows * plan.gradient_accumulation_steps * plan.data_parallel_size,
        }
    batch = Batch(
        **tokens,
        labels=labels,
        row_ids=torch.arange(rows),
        num_valid=int((labels != IGNORE_LABEL).sum()) * plan.gradient_accumulation_steps * plan.data_parallel_size,
        encoder=encoder,
        **of_pairs,
    )
    return [batch] * plan.gradient_accumulation_steps


def _full_rows(config: Config, rows: int, length: int) -> dict[str, Any]:
    """Tokens of rows of one document each."""
    generator = torch.Generator().manual_seed(0)
    borders = torch.full((max_documents(config.data, rows) + 1,), rows * length, dtype=torch.int32)
    borders[:rows] = torch.arange(0, rows * length, length, dtype=torch.int32)
    return {
        "input_ids": torch.randint(config.model.vocab_size, (rows * length,), generator=generator),
        "position_ids": torch.arange(length).repeat(rows),
        "cu_seqlens": borders,
    }
