"""MoBA of few queries over many keys, as in decoding: no key is copied, and none is read that was not chosen.

The blocks that the heads of one KV head chose are attended to one by one, by all of these heads at once; the parts are
merged by their logsumexp, without those that a head did not choose.

Legend: G query heads per KV head, N blocks that one of them chose, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu.flash import FLASH
from neomoba_dist.model.attention.kernels.cpu.tasks import Task
from neomoba_dist.model.attention.kernels.select import score_dtype


def few_queries_task(task: Task, out: Tensor, lse: Tensor) -> None:
    """Write the task's share of out [T, Hq, D] and lse [T, Hq], which are 0 and -inf."""
    chosen = task.chosen_blocks.tolist()
    for index, blocks_GC in enumerate(chosen):
        numbers = sorted({block for blocks in blocks_GC for block in blocks if block >= 0})
        if numbers:
            place = (task.rows.start + index, task.query_heads)
            out[place], lse[place] = _one_query(task, place, task.position + index, numbers, blocks_GC)


def _one_query(
    task: Task, place: tuple[int, slice], position: int, numbers: list[int], blocks_GC: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Output [G, D] and logsumexp [G] of one query's heads."""
    problem, doc = task.problem, task.doc
    size, first = problem.layout.block_size, doc.first_block
    stop = doc.keys.start + (min(doc.num_keys, position + 1) if problem.causal else doc.num_keys)
    exact = score_dtype(problem.q.dtype)
    q_GD = problem.q[place].to(exact)
    parts = []
    for number in numbers:
        start = doc.keys.start + (number - first) * size
        keys = slice(start, min(start + size, stop))
        k, v = (x[keys, task.head].to(exact)[None, None] for x in (problem.k, problem.v))
        parts.append(FLASH(q_GD[None, None], k, v, 0.0, False))
    outs_NGD = torch.stack([out[0, 0] for out, _ in parts])
    lses_NG = torch.stack([lse[0, 0] for _, lse in parts])
    unseen = torch.tensor([[number not in blocks for blocks in blocks_GC] for number in numbers])
    lses_NG = lses_NG.masked_fill(unseen, -torch.inf)
    outs_NGD = outs_NGD.masked_fill(unseen[..., None], 0.0)  # a weight of 0 does not silence what is not a number
    total_G = lses_NG.logsumexp(0)
    weights_NG = (lses_NG - total_G.masked_fill(total_G == -torch.inf, 0.0)).exp()
    return (outs_NGD * weights_NG[..., None]).sum(0), total_G
