"""Attention with any mask and bias by loops over documents, heads and queries: independent of the library."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tests.reference import block_score, block_summary, chosen_blocks

Sees = Callable[[int, int, int], bool]  # (query position, key position, document length)


def attention_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Sequence[int],
    *,
    sees: Sees,
    bias: Callable[[int, int], Tensor] | None = None,
    moba: tuple[int, int] | None = None,
    causal: bool = False,
) -> Tensor:
    """Output [T, Hq, D], differentiable. bias(head, query - key); moba: (block_size, top_k), narrows what is seen."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for start, stop in pairwise(borders):
        length = stop - start
        for i in range(length):
            heads = []
            for head in range(q.shape[1]):
                keys, values = k[start:stop, head // group].double(), v[start:stop, head // group].double()
                seen = [j for j in range(length) if sees(i, j, length)]
                if moba:
                    size, top_k = moba
                    blocks = [keys[low : low + size] for low in range(0, length, size)]
                    scores = [
                        block_score(q[start + i, head].detach(), block_summary(b.detach(), "mean")) for b in blocks
                    ]
                    chosen = chosen_blocks(scores, i // size, top_k, causal)
                    seen = [j for j in seen if j // size in chosen]
                logits = keys[seen] @ q[start + i, head].double() / math.sqrt(q.shape[2])
                if bias:
                    logits = logits + torch.stack([bias(head, i - j) for j in seen])
                heads.append(logits.softmax(0) @ values[seen])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def t5_bucket(distance: int, causal: bool) -> int:
    """The published rule (T5's relative_position_bucket with 32 buckets, largest distance 128), scalar."""
    number, bucket = (32, 0) if causal else (16, 16 if distance < 0 else 0)
    distance = max(distance, 0) if causal else abs(distance)
    exact = number // 2
    if distance < exact:
        return bucket + distance
    beyond = math.log(distance / exact) / math.log(128 / exact) * (number - exact)
    return bucket + min(exact + int(beyond + 1e-9), number - 1)


def key_conv_loops(k: Tensor, weight: Tensor, borders: Sequence[int], causal: bool) -> Tensor:
    """k [T, N, D], weight [N * D, W] -> k + silu(weighted sum of neighbours of the same document)."""
    width = weight.shape[1]
    taps = weight.double().reshape(k.shape[1], k.shape[2], width)
    rows = []
    for start, stop in pairwise(borders):
        for t in range(start, stop):
            total = torch.zeros(k.shape[1:], dtype=torch.float64)
            for w in range(width):
                source = t + w - (width - 1 if causal else width // 2)
                if start <= source < stop:
                    total = total + taps[:, :, w] * k[source].double()
            rows.append(k[t].double() + total * torch.sigmoid(total))
    return torch.stack(rows)
