"""Small models and batches for tests: the smallest case that counts (CONTRIBUTING.md, "How exactness is tested").

Two MoBA layers and one full layer, three documents in a row with at least six blocks in the longest, top_k 2, two KV
heads; uneven numbers of counted labels per row.
"""

from dataclasses import replace
from itertools import pairwise

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.data.batch import Batch, EncoderTokens

LENGTH, PAIR_LENGTH = 64, 80  # of a row, and of the encoder's in a pair


def tiny_model(**changes: object) -> ModelConfig:
    """A ModelConfig with blocks of 8 tokens."""
    settings = {
        "vocab_size": 151,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 1024,
        "moba_block_size": 8,
        "moba_top_k": 2,
        "hybrid_layer_count": 1,
        "initializer_range": 0.2,
        "qk_norm": True,
    }
    return ModelConfig(**{**settings, **changes})


def tiny_batch(seed: int, rows: int = 1, objective: str = "mlm", vocab_size: int = 151) -> Batch:
    """`rows` rows of 64 tokens: documents of 49, 10 and 5 tokens; the share of counted labels differs by row.

    For "span_corruption" these are the decoder's tokens, and the encoder has rows of 80: documents of 50, 17 and 9
    tokens, of which the decoder writes the first and the last, and padding.
    """
    if objective == "span_corruption":
        return _pair_batch(seed, rows, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    total = rows * LENGTH
    input_ids = torch.randint(0, vocab_size, (total,), generator=generator)
    borders = [row * LENGTH + offset for row in range(rows) for offset in (0, 49, 59)] + [total, total]
    position_ids = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)])
    if objective == "clm":
        labels = torch.cat((input_ids[1:], input_ids[:1]))
        labels[torch.tensor(borders[1:-1]) - 1] = -100
    else:
        labels = torch.randint(0, vocab_size, (total,), generator=generator)
    share = torch.rand((rows,), generator=generator).repeat_interleave(LENGTH) * 0.6 + 0.2
    labels[torch.rand((total,), generator=generator) > share] = -100
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        row_ids=torch.arange(rows) + seed * rows,
        num_valid=int((labels != -100).sum()),
    )


def _pair_batch(seed: int, rows: int, vocab_size: int) -> Batch:
    batch = tiny_batch(seed, rows, "clm", vocab_size)
    generator = torch.Generator().manual_seed(seed + 1000)
    borders = [row * PAIR_LENGTH + offset for row in range(rows) for offset in (0, 50, 67, 76)]
    borders += [rows * PAIR_LENGTH] * 2
    position_ids = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)])
    ends = [row * LENGTH + offset for row in range(rows) for offset in (0, 49, 49, 59)] + [rows * LENGTH] * 2
    return replace(
        batch,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        encoder=EncoderTokens(
            input_ids=torch.randint(0, vocab_size, (rows * PAIR_LENGTH,), generator=generator),
            position_ids=position_ids,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        ),
    )
