"""Attention through masks and biases, chunk of queries by chunk: exact for every mask, and never [T, T] at once.

Serves sliding windows, where each chunk looks at its neighbourhood only, and biases on the scores (ALiBi, T5), which
the other kernels do not know. The backward pass builds each chunk's mask again, so that none is kept. Two torch custom
operators, so that compiled graphs hold it whole.

Keys and values that are not finite turn the rows that see them into not-a-number, and no others: 0 times not-a-number
would spread to all rows of a chunk.

Shape letters: T queries, S keys, Hq/Hkv query and KV heads, D head size; Q queries and K keys of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.model.attention.kernels.select import isolate_damaged, score_dtype
from neomoba_dist.model.positions import bias_scores

CHUNK_QUERIES = 1024
CHUNK_ELEMENTS = 1 << 23  # of one chunk's mask; 32 MiB as float32


class Mask(NamedTuple):
    """Which keys a query sees.

    queries, keys: document and position within it, int64 [2, T] and [2, S]. aligned: queries and keys are the same
    tokens, so a chunk's keys can be narrowed down before they are masked. window: keys nearer than it are seen (0:
    all); the first `global_tokens` keys of each document are seen anyway, and `far_keys` are their indices
    [documents * global_tokens], -1 where a document is shorter. blocks: MoBA's choice, int32 [T, Hq, columns], -1 for
    none, with the block of every key, int64 [S], below num_blocks.
    """

    queries: Tensor
    keys: Tensor
    causal: bool
    aligned: bool
    window: int = 0
    global_tokens: int = 0
    far_keys: Tensor | None = None
    blocks: Tensor | None = None
    key_block: Tensor | None = None
    num_blocks: int = 0

    def chunks(self, num_heads: int, biased: bool) -> Iterator[tuple[slice, slice]]:
        """(queries, keys) that are computed at a time."""
        total, num_keys = self.queries.shape[1], self.keys.shape[1]
        near = self.aligned and self.window > 0
        width = min(num_keys, 4 * self.window) if near else num_keys
        heads = num_heads if biased or self.blocks is not None else 1
        height = max(1, min(CHUNK_QUERIES, CHUNK_ELEMENTS // max(1, width * heads)))
        if near:
            height = min(height, max(self.window, 128))
        for start in range(0, total, height):
            stop = min(start + height, total)
            low = max(0, start - self.window + 1) if near else 0
            high = min(num_keys, stop + self.window - 1) if near else num_keys
            yield slice(start, stop), slice(low, stop if self.aligned and self.causal else high)

    def gather(self, tensor: Tensor, keys: slice) -> Tensor:
        """The chunk's keys of `tensor` [S, ...], the far ones after the near ones."""
        return tensor[keys] if self.far_keys is None else torch.cat((tensor[keys], tensor[self.far_keys.clamp(min=0)]))

    def seen(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(bool [1, Q, K], or [Hq, Q, K] with blocks; query position - key position, int64 [Q, K])."""
        query_document, query_position = self.queries[:, rows]
        document, position = (self.gather(x, keys) for x in self.keys)
        distance = query_position[:, None] - position
        seen = query_document[:, None] == document
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= (distance.abs() < self.window) | (position < self.global_tokens)
        if self.far_keys is not None:  # those that are in the neighbourhood stand there already
            far = (self.far_keys >= 0) & ((self.far_keys < keys.start) | (self.far_keys >= keys.stop))
            seen[:, -len(far) :] &= far
        return (seen[None] if self.blocks is None else seen & self.chosen(rows, keys)), distance

    def chosen(self, rows: slice, keys: slice) -> Tensor:
        """bool [Hq, Q, K]: the keys of the blocks that MoBA chose."""
        assert self.blocks is not None
        assert self.key_block is not None
        index = self.blocks[rows].long() + 1  # 0 stands for no block
        chosen = torch.zeros(*index.shape[:2], self.num_blocks + 1, dtype=torch.bool, device=index.device)
        chosen.scatter_(-1, index, True)[..., 0] = False
        return chosen[..., self.key_block[keys] + 1].transpose(0, 1)


def attend_chunk(mask: Mask, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: slice, keys: slice) -> Tensor:
    """q [Q, Hq, D], k and v [K, Hkv, D] -> [Q, Hq, D]. bias: as in `masked_attention`."""
    seen, distance = mask.seen(rows, keys)
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q_broken, *broken = (~x.detach().isfinite().all(-1) for x in (q, k, v))
    spoilt = None
    if q.device.type != "cpu" or bool(q_broken.any() or broken[0].any() or broken[1].any()):  # asks no GPU
        key_broken = (broken[0] | broken[1]).repeat_interleave(group, dim=1).float()  # [K, Hq]
        spoilt = q_broken | ((seen.float() @ key_broken.t()[:, :, None])[..., 0].t() > 0)
        q, k, v = (x.masked_fill(where[..., None], 0) for x, where in zip((q, k, v), (q_broken, *broken), strict=True))
    additive = seen
    if bias is not None:
        # a bias of thousands has no room in half precision, so biased scores are added up in float32
        exact = torch.promote_types(dtype, torch.float32)
        q, k, v, bias = (x.to(exact) for x in (q, k, v, bias))
        additive = bias_scores(bias, distance).masked_fill(~seen, -torch.inf)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive[None], enable_gqa=group > 1)
    out = out[0].transpose(0, 1).to(dtype)
    return out if spoilt is None else out.masked_fill(spoilt[..., None], torch.nan)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Attention without gradient that also returns the logsumexp, for keys spread over ranks.

    Returns out [T, Hq, D] and lse [T, Hq], 0 and -inf where a query sees no key; both in the dtype of the scores.
    """
    dtype, heads = score_dtype(q.dtype), k.shape[1]
    out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    k, v = isolate_damaged(k.to(dtype), v.to(dtype))
    for rows, keys in mask.chunks(q.shape[1], biased=True):
        seen, _ = mask.seen(rows, keys)
        queries = q[rows].to(dtype).unflatten(1, (heads, -1))
        logits = torch.einsum("thgd,shd->hgts", queries, k[keys]).flatten(0, 1) * q.shape[2] ** -0.5
        logits = logits.masked_fill(~seen, -torch.inf)
        peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        weights = (logits - peak).exp()
        total = weights.sum(-1, keepdim=True)
        values = torch.einsum("hgts,shd->thgd", weights.unflatten(0, (heads, -1)), v[keys]).flatten(1, 2)
        out[rows] = values / total.clamp(min=torch.finfo(dtype).tiny)[..., 0].t()[..., None]
        lse[rows] = (total.log() + peak)[..., 0].t()
    return out, lse


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None = None) -> Tensor:
    """Softmax attention scaled by 1 / sqrt(D): q [T, Hq, D], k and v [S, Hkv, D] -> [T, Hq, D].

    Every query must see some key. bias: what positions.bias_scores computes the bias on the scores from.
    """
    return _forward(q, k, v, bias, *mask)


MASK = (
    "Tensor queries, Tensor keys, bool causal, bool aligned, SymInt window, SymInt global_tokens, Tensor? far_keys, "
    "Tensor? blocks, Tensor? key_block, SymInt num_blocks"
)


@torch.library.custom_op(
    "neomoba::masked_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {MASK}) -> Tensor",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    mask = Mask(*fields)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, keys in mask.chunks(q.shape[1], bias is not None):
        out[rows] = attend_chunk(mask, q[rows], mask.gather(k, keys), mask.gather(v, keys), bias, rows, keys)
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "neomoba::masked_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, bool trained, Tensor q, Tensor k, Tensor v, Tensor? bias, {MASK}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, trained: bool, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *fields: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, which is empty if it is not `trained`."""
    mask = Mask(*fields)
    exact = torch.promote_types(q.dtype, torch.float32)  # keys add up what they get from several chunks
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=exact, memory_format=torch.contiguous_format) for x in (k, v))
    dbias = torch.zeros_like(bias, dtype=exact) if trained and bias is not None else q.new_zeros(0)
    far = 0 if mask.far_keys is None else len(mask.far_keys)
    dfar = [x.new_zeros(far, *x.shape[1:]) for x in (dk, dv)]
    for rows, keys in mask.chunks(q.shape[1], bias is not None):
        parts = [q[rows], mask.gather(k, keys), mask.gather(v, keys), *([bias] if trained else [])]
        # torch.autograd is switched off inside a custom operator, torch.func is not
        pull_back = torch.func.vjp(partial(_attend_leaves, mask, bias, rows, keys), *parts)[1]
        dq[rows], *key_grads = pull_back(grad[rows])
        near = keys.stop - keys.start
        for total, total_far, part in zip((dk, dv), dfar, key_grads[:2], strict=True):
            total[keys] += part[:near]
            total_far += part[near:]
        if trained:
            dbias += key_grads[2]
    if mask.far_keys is not None:
        for total, total_far in zip((dk, dv), dfar, strict=True):
            # unique but for the absent ones, which add zeros: the sum has one order
            total.index_add_(0, mask.far_keys.clamp(min=0), total_far)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(q.dtype if bias is None else bias.dtype)


def _attend_leaves(mask: Mask, bias: Tensor | None, rows: slice, keys: slice, *leaves: Tensor) -> Tensor:
    """`attend_chunk` as a function of what is differentiated: q, k, v and perhaps the bias."""
    q, k, v, *trained = leaves
    return attend_chunk(mask, q, k, v, trained[0] if trained else bias, rows, keys)


@_backward.register_fake
def _(
    grad: Tensor, trained: bool, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *fields: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if trained and bias is not None else (q if bias is None else bias).new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if there else value for there, value in zip(ctx.is_tensor, ctx.values, strict=True)]
    trained = inputs[3] is not None and ctx.needs_input_grad[3]
    *grads, dbias = _backward(grad, trained, *inputs)
    return *grads, dbias if trained else None, *[None] * (len(inputs) - 4)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
