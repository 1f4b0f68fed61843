"""Pairs of texts: which of the two a token belongs to, and whether the second one follows the first.

BERT (arXiv 1810.04805): segment embeddings (section 3.2, figure 2), next-sentence prediction (sections 3.1 and A.2).

Shape letters: T tokens of this rank's share of the sequence, S those of this rank (T / tp under sequence parallelism),
P of the T that go through the head for pairs (`Batch.pairs`), H hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.tensor import pick_tokens

NEXT_SENTENCE_NAME = "next_sentence"  # what the logical names of the head's weights begin with


class SegmentEmbedding(nn.Module):
    """Adds an embedding of `PackedTokens.token_types` to that of the tokens: State -> State (model/block.py).

    Where nobody says what the types are, as of single texts, all tokens are of type 0.
    """

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.mesh = init.mesh
        # "embedding." keeps it out of weight decay, like the token table
        self.weight = init.weight("embedding.token_types", (config.type_vocab_size, config.hidden_size))

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x_SH, aux_loss, position_ids, cu_seqlens, packed = state
        types = torch.zeros_like(position_ids) if packed.token_types is None else packed.token_types
        if self.mesh.sequence_parallel:
            types = types.narrow(0, self.mesh["tp"].index * len(x_SH), len(x_SH))
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.mesh.sequence_parallel else self.weight
        return x_SH + F.embedding(types, weight), aux_loss, position_ids, cu_seqlens, packed


class NextSentence(nn.Module):
    """Dense and tanh of the tokens at `PackedTokens.pairs`, the first ones of pairs, then two logits: State -> the same
    and logits [P, 2], at least float32.

    What it computes is small, so every tp rank does all of it: weights and their gradients are alike on all of them.
    """

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.mesh, size = init.mesh, config.hidden_size
        self.dense = init.weight(f"{NEXT_SENTENCE_NAME}.dense.weight", (size, size))
        self.dense_bias = init.weight(f"{NEXT_SENTENCE_NAME}.dense.bias", (size,), scale=0.0)
        self.output = init.weight(f"{NEXT_SENTENCE_NAME}.output.weight", (2, size))
        self.output_bias = init.weight(f"{NEXT_SENTENCE_NAME}.output.bias", (2,), scale=0.0)

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        first_PH = pick_tokens(state[0], state[-1].pairs, self.mesh)
        pooled_PH = torch.tanh(F.linear(first_PH, self.dense, self.dense_bias))
        logits_P2 = F.linear(pooled_PH, self.output, self.output_bias)
        return *state, logits_P2.to(torch.promote_types(logits_P2.dtype, torch.float32))


def next_sentence_sums(logits_P2: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of all pairs, and how many of them the larger logit is right about: [2]. Where the
    label is -100 there is no pair."""
    loss = F.cross_entropy(logits_P2, labels_P, reduction="sum")
    return torch.stack((loss, (logits_P2.argmax(dim=1) == labels_P).sum().to(loss.dtype)))
