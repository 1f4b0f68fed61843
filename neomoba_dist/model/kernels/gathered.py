"""MoBA on the CPU: decides document by document how to compute, and runs the heads side by side.

- every block chosen: full attention by torch's flash kernel, the same bits as `full_attention`;
- small documents: the same kernel with an additive mask, because gathering costs tens of microseconds per block;
- all others: queries gathered per block (gather_plan, gather_head).

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, R = Hq or Hkv rows of the routing,
N blocks of one document.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from neomoba_dist.model.kernels.flash_cpu import flash_backward, flash_forward, group_queries
from neomoba_dist.model.kernels.gather_tasks import Document, Problem, backward_task, forward_task, head_pieces
from neomoba_dist.model.kernels.routing import score_dtype
from neomoba_dist.model.kernels.workers import run_side_by_side

# Nanoseconds on one AVX-512 core, forward: they only decide which of two exact methods runs.
NS_PER_FLASH_PAIR, NS_PER_GATHERED_PAIR, NS_PER_BLOCK = 3.5, 1.4, 60_000.0
MASK_ELEMENTS = 1 << 24  # of one additive mask


def attend_cpu(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq]; see moba.attend."""
    q = problem.q
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=score_dtype(q.dtype))
    tasks = []
    for doc in documents(problem, sparse_only=False):
        if doc.method == "gathered":
            for head, rows in head_pieces(problem, doc):
                tasks.append(partial(forward_task, problem, doc, head, rows, out, lse))
            continue
        k, v = problem.k[doc.keys], problem.v[doc.keys]
        for rows, mask_THS in flash_pieces(problem, doc):
            out[rows], part_lse = flash_forward(q[rows], k, v, problem.causal, _additive(mask_THS, problem))
            if mask_THS is not None:
                part_lse = part_lse.masked_fill(~mask_THS.any(-1), -torch.inf)
            lse[rows] = part_lse
    run_side_by_side(tasks)
    return out, lse


def attend_cpu_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; every sum runs in one fixed order."""
    q, causal = problem.q, problem.causal
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, problem.k, problem.v))
    tasks, targets = [], []
    for doc in documents(problem, sparse_only=grad_lse is not None):
        if doc.method == "gathered":
            for head, rows in head_pieces(problem, doc):
                tasks.append(partial(backward_task, problem, doc, head, rows, out, lse, grad_out, grad_lse, dq))
                targets.append((doc.keys, head))
            continue
        k, v = problem.k[doc.keys], problem.v[doc.keys]
        for rows, mask_THS in flash_pieces(problem, doc):
            part_lse = lse[rows].masked_fill(lse[rows] == -torch.inf, torch.inf)  # rows without keys weigh nothing
            mask = _additive(mask_THS, problem)
            dq[rows], part_dk, part_dv = flash_backward(
                grad_out[rows], q[rows], k, v, out[rows], part_lse, causal, mask
            )
            dk[doc.keys] += part_dk
            dv[doc.keys] += part_dv
    for (keys, head), (part_dk, part_dv) in zip(targets, run_side_by_side(tasks), strict=True):
        dk[keys, head] += part_dk
        dv[keys, head] += part_dv
    return dq, dk, dv


def documents(problem: Problem, *, sparse_only: bool) -> list[Document]:
    """The documents that have both queries and keys. `sparse_only`: the flash kernel knows no gradient of the lse."""
    layout, routes = problem.layout, problem.routes
    if layout.spans is not None:
        tokens, keys = problem.q.shape[0], problem.k.shape[0]
        return [Document(slice(0, tokens), slice(0, keys), 0, 0, "gathered")] if tokens and keys else []
    found = []
    borders = zip(pairwise(layout.cu_q.tolist()), pairwise(layout.cu_k.tolist()), strict=True)
    places = zip(borders, layout.q_offset.tolist(), layout.first_block[:-1].tolist(), strict=True)
    for (q_span, k_span), position, first_block in places:
        if q_span[1] == q_span[0] or k_span[1] == k_span[0]:
            continue
        doc = Document(slice(*q_span), slice(*k_span), position, first_block, "full")
        if routes is not None:
            method = "gathered" if sparse_only else _cheapest_method(problem, doc, routes)
            doc = doc._replace(method=method)
        found.append(doc)
    return found


def _cheapest_method(problem: Problem, doc: Document, routes: Tensor) -> str:
    block_size, num_heads = problem.layout.block_size, problem.q.shape[1]
    blocks = -(-doc.num_keys // block_size)
    square = doc.position == 0 and doc.num_queries == doc.num_keys
    if (square or not problem.causal) and _all_chosen(routes[doc.queries], blocks, block_size, problem.causal):
        return "full"
    pairs = num_heads * doc.num_queries * doc.num_keys
    sparse_pairs = num_heads * doc.num_queries * min(doc.num_keys, routes.shape[2] * block_size)
    gathered = sparse_pairs * NS_PER_GATHERED_PAIR + blocks * problem.k.shape[1] * NS_PER_BLOCK
    if gathered < pairs * NS_PER_FLASH_PAIR:
        return "gathered"
    # An additive mask does not hide a key that is not a number.
    finite = problem.q[doc.queries].isfinite().all() & problem.k[doc.keys].isfinite().all()
    return "masked" if bool(finite) else "gathered"


def _all_chosen(routes_TRC: Tensor, blocks: int, block_size: int, causal: bool) -> bool:
    """Whether every query of a document attends to every block that full attention would show it."""
    tokens, heads, columns = routes_TRC.shape
    if columns < blocks:
        return False
    whole, rest = divmod(tokens, block_size)
    expected = block_size * whole * (whole + 1) // 2 + rest * (whole + 1) if causal else tokens * blocks
    return int((routes_TRC >= 0).sum()) == expected * heads


def flash_pieces(problem: Problem, doc: Document) -> Iterator[tuple[slice, Tensor | None]]:
    """What the flash kernel computes at a time: queries, and the keys each sees, bool [queries, Hq, S] (None: all)."""
    if doc.method == "full" or problem.routes is None:
        yield doc.queries, None
        return
    height = max(1, MASK_ELEMENTS // (doc.num_keys * problem.q.shape[1]))
    for start in range(doc.queries.start, doc.queries.stop, height):
        rows = slice(start, min(start + height, doc.queries.stop))
        yield rows, document_mask(problem, problem.routes[rows], doc, rows)


def document_mask(problem: Problem, routes_TRC: Tensor, doc: Document, rows: slice) -> Tensor:
    """bool [queries, Hq, S]: the keys of one document that some of its queries see."""
    routes_TRC = (routes_TRC - (doc.first_block - 1)).clamp_(min=0).long()  # 0 for "no block"
    blocks = -(-doc.num_keys // problem.layout.block_size)
    position = torch.arange(doc.num_keys)
    block = position // problem.layout.block_size + 1
    chosen = torch.zeros(*routes_TRC.shape[:2], blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, routes_TRC[:, :, 1:], True)
    own = routes_TRC[:, :, :1] == block
    if problem.causal:
        start = doc.position + rows.start - doc.queries.start
        own &= (position <= torch.arange(start, start + rows.stop - rows.start)[:, None])[:, None]
    chosen[:, :, 0] = False
    seen = own.logical_or_(chosen.index_select(-1, block))
    return seen.repeat_interleave(problem.q.shape[1] // seen.shape[1], dim=1)


def _additive(mask_THS: Tensor | None, problem: Problem) -> Tensor | None:
    """The mask as the flash kernel adds it: [Hkv, G, T, S] of 0 and -inf."""
    if mask_THS is None:
        return None
    additive = torch.zeros(mask_THS.shape, dtype=problem.q.dtype).masked_fill_(~mask_THS, -torch.inf)
    return group_queries(additive, problem.k.shape[1])
