"""MoBA on the CPU: decides document by document how to compute, and runs the heads side by side.

- every block chosen: full attention by torch's flash kernel, the same bits as `full_attention`; so too the first
  queries of a causal document, which see all keys before them, where blocks are small;
- small documents: the same kernel with an additive mask, because gathering costs tens of microseconds per block;
- few queries and many keys, as in decoding: only the chosen blocks are read;
- all others: queries gathered per block (gather_plan, gather_head).

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, R = Hq or Hkv rows of the selection,
N blocks of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu.few import few_queries_task
from neomoba_dist.model.attention.kernels.cpu.flash import flash_backward, flash_forward, group_queries
from neomoba_dist.model.attention.kernels.cpu.head import is_finite
from neomoba_dist.model.attention.kernels.cpu.tasks import (
    Document,
    backward_task,
    forward_task,
    split_document,
)
from neomoba_dist.model.attention.kernels.cpu.threads import one_thread, run_side_by_side
from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.select import score_dtype

# Nanoseconds on one AVX-512 core, forward: they only decide which of two exact methods runs.
NS_PER_FLASH_PAIR, NS_PER_MASKED_PAIR, NS_PER_GATHERED_PAIR, NS_PER_BLOCK = 3.7, 7.0, 2.9, 80_000.0
FLASH_TILE = 512  # keys; the causal flash kernel skips whole tiles only
FEW = 2  # queries are few if all blocks that they choose hold less than this part of the keys
FORWARD = {"gathered": forward_task, "few": few_queries_task}  # methods that work head by head
MASK_ELEMENTS = 1 << 24  # of one additive mask


def attend_cpu(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq]; see moba.attend."""
    with one_thread():
        problem = _spell_out(problem)
        q = problem.q
        docs = documents(problem, sparse_only=False)
        out = _rows_to_write(q, docs)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=score_dtype(q.dtype))
    tasks: list[Callable[[], None]] = []
    for doc in docs:
        if run := FORWARD.get(doc.method):
            tasks.extend(partial(run, task, out, lse) for task in split_document(problem, doc))
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
    with one_thread():
        problem = _spell_out(problem)
        q, causal = problem.q, problem.causal
        docs = documents(problem, sparse_only=grad_lse is not None)
        dq = _rows_to_write(q, docs)
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (problem.k, problem.v))
    tasks, targets = [], []
    for doc in docs:
        if doc.method in FORWARD:
            for task in split_document(problem, doc):
                tasks.append(partial(backward_task, task, out, lse, grad_out, grad_lse, dq))
                targets.append((doc.keys, task.head))
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
    parts = run_side_by_side(tasks)
    with one_thread():
        for (keys, head), (part_dk, part_dv) in zip(targets, parts, strict=True):
            dk[keys, head] += part_dk
            dv[keys, head] += part_dv
    return dq, dk, dv


def _rows_to_write(q: Tensor, docs: list[Document]) -> Tensor:
    """A result of the shape of q: zeros only where some queries have no keys, as clearing costs as much as writing."""
    written = sum(doc.num_queries for doc in docs if doc.method != "few")
    make = torch.empty_like if written == len(q) else torch.zeros_like
    return make(q, memory_format=torch.contiguous_format)


def documents(problem: Problem, *, sparse_only: bool) -> list[Document]:
    """The documents that have both queries and keys. `sparse_only`: the flash kernel knows no gradient of the lse."""
    layout, block_indices = problem.layout, problem.block_indices
    if layout.spans is not None:
        tokens, total = problem.q.shape[0], problem.k.shape[0]
        return [Document(slice(0, tokens), slice(0, total), 0, 0, "gathered")] if tokens and total else []
    found = []
    for queries, keys, position, blocks in layout.places():
        if queries.stop == queries.start or keys.stop == keys.start:
            continue
        doc = Document(queries, keys, position, blocks.start, "full")
        if sparse_only and block_indices is not None:
            found.append(doc._replace(method="gathered"))
        else:
            found.extend([doc] if block_indices is None else _choose_methods(problem, doc, block_indices))
    return found


def _spell_out(problem: Problem) -> Problem:
    """Full attention over damaged values as a selection of each document's one block, so that it may be gathered."""
    if problem.block_indices is not None or not problem.causal or is_finite(problem.v):
        return problem
    layout = replace(problem.layout, placed=None)  # what is known are MoBA's blocks
    own = layout.current_blocks(*layout.query_positions(0, problem.q.shape[0]))
    return problem._replace(layout=layout, block_indices=own.int()[:, None, None].expand(-1, problem.k.shape[1], -1))


def _choose_methods(problem: Problem, doc: Document, block_indices: Tensor) -> list[Document]:
    """The document as one piece or two, each with the cheapest way to compute it."""
    block_size, causal = problem.layout.block_size, problem.causal
    if doc.num_queries * problem.group * block_indices.shape[2] * block_size <= doc.num_keys // FEW:
        return [doc._replace(method="few")]
    values_finite = is_finite(problem.v[doc.keys])
    flash = values_finite or not causal  # the causal flash kernel lets a damaged value reach earlier queries
    square = doc.position == 0 and doc.num_queries == doc.num_keys
    blocks = -(-doc.num_keys // block_size)
    if flash and (square or not causal) and _all_chosen(block_indices[doc.queries], blocks, block_size, causal):
        return [doc]
    early = block_indices.shape[2] * block_size  # causal queries before it see all keys before them
    exact = problem.q.dtype == score_dtype(problem.q.dtype)  # half precision would round the gradients of two pieces
    if exact and causal and square and values_finite and early < doc.num_queries and _prefers_flash(problem, early):
        split = doc.queries.start + early
        head = doc._replace(queries=slice(doc.queries.start, split), keys=slice(doc.keys.start, doc.keys.start + early))
        if _all_chosen(block_indices[head.queries], block_indices.shape[2], block_size, causal):
            tail = doc._replace(queries=slice(split, doc.queries.stop), position=early)
            return [head, tail._replace(method=_cheapest_method(problem, tail, values_finite))]
    return [doc._replace(method=_cheapest_method(problem, doc, values_finite))]


def _prefers_flash(problem: Problem, tokens: int) -> bool:
    """Whether causal full attention over the first tokens of a document is faster than gathering their blocks."""
    rows, blocks = problem.q.shape[1] * tokens, problem.k.shape[1] * tokens // problem.layout.block_size
    flash = rows * min(tokens, (tokens + FLASH_TILE) / 2) * NS_PER_FLASH_PAIR
    return flash < rows * tokens / 2 * NS_PER_GATHERED_PAIR + blocks * NS_PER_BLOCK


def _cheapest_method(problem: Problem, doc: Document, values_finite: bool) -> str:
    assert problem.block_indices is not None
    block_size, num_heads = problem.layout.block_size, problem.q.shape[1]
    pairs = num_heads * doc.num_queries * doc.num_keys
    sparse_pairs = num_heads * doc.num_queries * min(doc.num_keys, problem.block_indices.shape[2] * block_size)
    blocks = -(-doc.num_keys // block_size) * problem.k.shape[1]
    gathered = sparse_pairs * NS_PER_GATHERED_PAIR + blocks * NS_PER_BLOCK
    if pairs * NS_PER_MASKED_PAIR > gathered:
        return "gathered"
    # An additive mask does not hide a key that is not a number.
    maskable = values_finite and is_finite(problem.q[doc.queries]) and is_finite(problem.k[doc.keys])
    return "masked" if maskable else "gathered"


def _all_chosen(block_indices_TRC: Tensor, blocks: int, block_size: int, causal: bool) -> bool:
    """Whether every query of a document attends to every block that full attention would show it."""
    tokens, heads, columns = block_indices_TRC.shape
    if columns < blocks:
        return False
    whole, rest = divmod(tokens, block_size)
    expected = block_size * whole * (whole + 1) // 2 + rest * (whole + 1) if causal else tokens * blocks
    return int((block_indices_TRC >= 0).sum()) == expected * heads


def flash_pieces(problem: Problem, doc: Document) -> Iterator[tuple[slice, Tensor | None]]:
    """What the flash kernel computes at a time: queries, and the keys each sees, bool [queries, Hq, S] (None: all)."""
    if doc.method == "full" or problem.block_indices is None:
        yield doc.queries, None
        return
    height = max(1, MASK_ELEMENTS // (doc.num_keys * problem.q.shape[1]))
    for start in range(doc.queries.start, doc.queries.stop, height):
        rows = slice(start, min(start + height, doc.queries.stop))
        yield rows, document_mask(problem, problem.block_indices[rows], doc, rows)


def document_mask(problem: Problem, block_indices_TRC: Tensor, doc: Document, rows: slice) -> Tensor:
    """bool [queries, Hq, S]: the keys of one document that some of its queries see."""
    block_indices_TRC = (block_indices_TRC - (doc.first_block - 1)).clamp_(min=0).long()  # 0 for "no block"
    blocks = -(-doc.num_keys // problem.layout.block_size)
    position = torch.arange(doc.num_keys)
    block = position // problem.layout.block_size + 1
    chosen = torch.zeros(*block_indices_TRC.shape[:2], blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, block_indices_TRC[:, :, 1:], True)
    own = block_indices_TRC[:, :, :1] == block
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
