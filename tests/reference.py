"""Attention by loops over documents, heads and queries, in float64: independent of every line of neomoba_dist."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Seen = Callable[[int, int], Sequence[int]]  # (query, query head) -> the keys it attends to
Bias = Callable[[int, int, int], Tensor]  # (query head, query, key) -> what is added to the scaled product


def attention_loops(q: Tensor, k: Tensor, v: Tensor, seen: Seen, bias: Bias | None = None) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq] in float64, differentiable; q [T, Hq, D], k and v [S, Hkv, D].

    A query without keys gets 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    out, lse = [], []
    for token in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = list(seen(token, head))
            if not keys:
                out.append(q.new_zeros(q.shape[2], dtype=torch.float64))
                lse.append(q.new_tensor(-torch.inf, dtype=torch.float64))
                continue
            logits = k[keys, head // group].double() @ q[token, head].double() / math.sqrt(q.shape[2])
            if bias is not None:
                logits = logits + torch.stack([bias(head, token, key) for key in keys])
            out.append(logits.softmax(0) @ v[keys, head // group].double())
            lse.append(logits.logsumexp(0))
    if not out:
        return q.new_zeros(0, dtype=torch.float64), q.new_zeros(0, dtype=torch.float64)
    return torch.stack(out).view(q.shape), torch.stack(lse).view(q.shape[:2])


def document_start_and_stop(token: int, borders: Sequence[int]) -> tuple[int, int]:
    return next((start, stop) for start, stop in pairwise(borders) if start <= token < stop)


def keys_in_document(borders: Sequence[int], sees: Callable[[int, int, int], bool]) -> Seen:
    """The keys of the query's document for which sees(query position, key position, document length)."""

    def seen(token: int, head: int) -> list[int]:
        start, stop = document_start_and_stop(token, borders)
        return [key for key in range(start, stop) if sees(token - start, key - start, stop - start)]

    return seen


def block_summary(k_LD: Tensor, pooling: str) -> list[Tensor]:
    """What stands for one block of keys at the gate: one vector, or maximum and minimum for "minmax"."""
    if pooling == "mean":
        exact = torch.float64 if k_LD.dtype == torch.float64 else torch.float32
        return [k_LD.to(exact).mean(0).to(k_LD.dtype).double()]
    if pooling == "max":
        return [k_LD.amax(0).double()]
    if pooling == "minmax":
        return [k_LD.amax(0).double(), k_LD.amin(0).double()]
    return [k_LD[-1].double()]


def block_score(q_D: Tensor, summary: list[Tensor]) -> float:
    if len(summary) == 1:
        return float(q_D.double() @ summary[0])
    return float(torch.maximum(q_D.double() * summary[0], q_D.double() * summary[1]).sum())


def chosen_blocks(scores: list[float], own: int, top_k: int, causal: bool) -> set[int]:
    """The current block and the top_k - 1 best others; of equal scores the higher index wins."""
    others = range(own) if causal else [block for block in range(len(scores)) if block != own]
    best = sorted(others, key=lambda block: (scores[block], block), reverse=True)
    return {own, *best[: top_k - 1]}


def keys_of_moba(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    borders: Sequence[int],
    gate: str = "per_head",
    pooling: str = "mean",
) -> Seen:
    """The keys of the blocks that MoBA chooses, up to the query itself if `causal`."""
    q, k, group = q.detach(), k.detach(), q.shape[1] // k.shape[1]
    summaries = {
        (start, head): [
            block_summary(k[low : min(low + block_size, stop), head], pooling) for low in range(start, stop, block_size)
        ]
        for start, stop in pairwise(borders)
        for head in range(k.shape[1])
    }

    def seen(token: int, head: int) -> list[int]:
        start, stop = document_start_and_stop(token, borders)
        voters = range(head // group * group, (head // group + 1) * group) if gate == "kv_group" else [head]
        scores = [sum(block_score(q[token, h], s) for h in voters) for s in summaries[start, head // group]]
        chosen = chosen_blocks(scores, (token - start) // block_size, top_k, causal)
        last = token if causal else stop - 1
        return [key for key in range(start, last + 1) if (key - start) // block_size in chosen]

    return seen


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
