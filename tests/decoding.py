"""What decoding is compared with: one pass over the whole texts, and greedy choice by doing that again per token."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.neobert import NeoBERT


@dataclass(frozen=True)
class Texts:
    """Packed documents, as the model reads them."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    row_ids: torch.Tensor
    counted: None = None
    encoder: None = None
    token_type_ids: None = None
    next_sentence_labels: None = None
    pairs: None = None


def pack(documents: list[list[int]]) -> Texts:
    ids = torch.tensor([i for ids in documents for i in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    borders = torch.tensor([0, *accumulate(len(ids) for ids in documents)], dtype=torch.int32)
    return Texts(ids, torch.full_like(ids, -100), positions, borders, torch.zeros(1, dtype=torch.int64))


def random_documents(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 151, (n,), generator=generator).tolist() for n in lengths]


def whole_pass(model: NeoBERT, documents: list[list[int]], decode: str) -> list[torch.Tensor]:
    """Logits [length, V] of every document. decode "full" turns MoBA layers full: no sliding windows then."""
    assert decode == "moba" or "sliding_window" not in model.config.layer_attentions
    set_full_attention(model, decode == "full")
    with torch.no_grad():
        logits = model.logits(model.hidden_states(pack(documents)))
    set_full_attention(model, False)
    return list(logits.split([len(ids) for ids in documents]))


def greedy_by_recomputing(model: NeoBERT, prompt: list[int], new: int, decode: str) -> list[int]:
    text = list(prompt)
    for _ in range(new):
        text.append(int(whole_pass(model, [text], decode)[0][-1].argmax()))
    return text[len(prompt) :]
