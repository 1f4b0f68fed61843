"""MoBA by loops over documents, heads and queries, in float64: independent of every line of neomoba_dist."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


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


def moba_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    borders: Sequence[int],
    gate: str = "per_head",
    pooling: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq] in float64, differentiable; q [T, Hq, D], k and v [T, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    out = [[None] * q.shape[1] for _ in range(q.shape[0])]
    lse = [[None] * q.shape[1] for _ in range(q.shape[0])]
    for start, stop in pairwise(borders):
        blocks = [range(low, min(low + block_size, stop)) for low in range(start, stop, block_size)]
        for head in range(q.shape[1]):
            keys = k[:, head // group]
            summaries = [block_summary(keys[block.start : block.stop].detach(), pooling) for block in blocks]
            voters = range(head // group * group, (head // group + 1) * group) if gate == "kv_group" else [head]
            for token in range(start, stop):
                scores = [sum(block_score(q[token, h].detach(), s) for h in voters) for s in summaries]
                own = (token - start) // block_size
                seen = [key for block in chosen_blocks(scores, own, top_k, causal) for key in blocks[block]]
                seen = torch.tensor([key for key in sorted(seen) if not causal or key <= token])
                logits = keys[seen].double() @ q[token, head].double() / q.shape[2] ** 0.5
                out[token][head] = logits.softmax(0) @ v[seen, head // group].double()
                lse[token][head] = logits.logsumexp(0)
    stacked = [torch.stack([torch.stack(row) for row in rows]) if rows else q.new_zeros(0) for rows in (out, lse)]
    return stacked[0], stacked[1]
