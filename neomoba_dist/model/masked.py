"""Attention through masks and biases, chunk of queries by chunk: exact for every mask, and never [T, T] at once.

Serves sliding windows, where each chunk looks at its neighbourhood only, and biases on the scores (ALiBi, T5), which
the other kernels do not know. The backward pass builds each chunk's mask again, so that none is kept. Exact, but not
the fastest: a compiled graph breaks here.

Shape letters: T queries, S keys, Hq/Hkv query and KV heads, D head size; Q queries and K keys of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.moba import block_means, route
from neomoba_dist.model.positions import ScoreBias

CHUNK_QUERIES = 1024
CHUNK_ELEMENTS = 1 << 23  # of one chunk's mask; 32 MiB as float32


@dataclass(frozen=True)
class Places:
    """Document and position within it of packed tokens: int64, both [N]."""

    document: Tensor
    position: Tensor

    def at(self, index: Tensor | slice) -> Places:
        """Those of some of the tokens."""
        return Places(self.document[index], self.position[index])


def find_places(total: int, cu_seqlens: Tensor, offset: Tensor | None = None) -> Places:
    """Places of `total` tokens with borders int32 [documents + 1]; offset: position of each document's first token."""
    index = torch.arange(total, device=cu_seqlens.device, dtype=torch.int64)
    borders = cu_seqlens.long()
    document = torch.searchsorted(borders[1:], index, right=True)
    position = index - borders[document]
    return Places(document, position if offset is None else position + offset[document])


@dataclass(frozen=True)
class Routes:
    """MoBA's choice. blocks: int32 [T, Hq, columns], -1 for none; key_block: block of every key, int64 [S], below
    num_blocks."""

    blocks: Tensor
    key_block: Tensor
    num_blocks: int

    def chosen(self, rows: slice, keys: slice) -> Tensor:
        """bool [Hq, Q, K]."""
        index = self.blocks[rows].long() + 1  # 0 stands for no block
        chosen = torch.zeros(*index.shape[:2], self.num_blocks + 1, dtype=torch.bool, device=index.device)
        chosen.scatter_(-1, index, True)[..., 0] = False
        return chosen[..., self.key_block[keys] + 1].transpose(0, 1)


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what is added to its scores.

    aligned: queries and keys are the same tokens, so a chunk's keys can be narrowed down before they are masked.
    window: keys nearer than it are seen (0: all); the first `global_tokens` keys of each document are seen anyway, and
    `far_keys` are their indices [documents * global_tokens], -1 where a document is shorter.
    """

    queries: Places
    keys: Places
    causal: bool
    aligned: bool
    window: int = 0
    global_tokens: int = 0
    far_keys: Tensor | None = None
    routes: Routes | None = None
    bias: ScoreBias | None = None

    def chunks(self, num_heads: int) -> Iterator[tuple[slice, slice]]:
        """(queries, keys) that are computed at a time."""
        total, num_keys = len(self.queries.position), len(self.keys.position)
        near = self.aligned and self.window > 0
        width = min(num_keys, 4 * self.window) if near else num_keys
        heads = 1 if self.routes is None and self.bias is None else num_heads
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
        """(bool [Q, K], or [Hq, Q, K] with routes; query position - key position, int64 [Q, K])."""
        query = self.queries.at(rows)
        document, position = self.gather(self.keys.document, keys), self.gather(self.keys.position, keys)
        distance = query.position[:, None] - position
        seen = query.document[:, None] == document
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= (distance.abs() < self.window) | (position < self.global_tokens)
        if self.far_keys is not None:  # those that are in the neighbourhood stand there already
            far = (self.far_keys >= 0) & ((self.far_keys < keys.start) | (self.far_keys >= keys.stop))
            seen[:, -len(far) :] &= far
        if self.routes is not None:
            seen = seen & self.routes.chosen(rows, keys)
        return seen, distance

    def attend(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, rows: slice, keys: slice) -> Tensor:
        """One chunk: q [Q, Hq, D], k and v [K, Hkv, D] -> [Q, Hq, D]. weight: of the bias."""
        seen, distance = self.seen(rows, keys)
        mask, dtype = seen if seen.dim() == 3 else seen[None], q.dtype
        if self.bias is not None and weight is not None:
            # a bias of thousands has no room in half precision, so biased scores are added up in float32
            exact = torch.promote_types(dtype, torch.float32)
            q, k, v, weight = (x.to(exact) for x in (q, k, v, weight))
            mask = self.bias.scores(weight, distance).masked_fill(~mask, -torch.inf)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=grouped)
        return out[0].transpose(0, 1).to(dtype)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: ScoreBias | None = None) -> Tensor:
    """Softmax attention scaled by 1 / sqrt(D): q [T, Hq, D], k and v [S, Hkv, D] -> [T, Hq, D].

    Every query must see some key.
    """
    return _Chunked.apply(q, k, v, None if bias is None else bias.weight_N(q.device), replace(mask, bias=bias))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, mask: Mask) -> Tensor:
        ctx.save_for_backward(q, k, v, weight)
        ctx.mask = mask
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, keys in mask.chunks(q.shape[1]):
            out[rows] = mask.attend(q[rows], mask.gather(k, keys), mask.gather(v, keys), weight, rows, keys)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, weight), mask = ctx.saved_tensors, ctx.mask
        exact = torch.promote_types(q.dtype, torch.float32)  # keys add up what they get from several chunks
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        trained = weight is not None and weight.requires_grad
        dweight = torch.zeros_like(weight, dtype=exact) if trained else None
        far = 0 if mask.far_keys is None else len(mask.far_keys)
        dfar = [x.new_zeros(far, *x.shape[1:]) for x in (dk, dv)]
        for rows, keys in mask.chunks(q.shape[1]):
            parts = [q[rows], mask.gather(k, keys), mask.gather(v, keys), *([weight] if trained else [])]
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                out = mask.attend(*leaves[:3], leaves[3] if trained else weight, rows, keys)
            dq[rows], *key_grads = torch.autograd.grad(out, leaves, grads[0][rows])
            near = keys.stop - keys.start
            for total, total_far, part in zip((dk, dv), dfar, key_grads[:2], strict=True):
                total[keys] += part[:near]
                total_far += part[near:]
            if dweight is not None:
                dweight += key_grads[2]
        if mask.far_keys is not None:
            for total, total_far in zip((dk, dv), dfar, strict=True):
                # unique but for the absent ones, which add zeros: the sum has one order
                total.index_add_(0, mask.far_keys.clamp(min=0), total_far)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None if dweight is None else dweight.to(weight.dtype), None


def unusual_attention(
    q: Tensor, k: Tensor, v: Tensor, kind: str, config: ModelConfig, bias: ScoreBias | None, cu_seqlens: Tensor
) -> Tensor:
    """The core of a sliding-window layer, or of a layer of any kind with a bias on its scores."""
    if kind == "sliding_window":
        window, far = config.sliding_window, config.global_tokens
        return sliding_window_attention(
            q, k, v, window=window, global_tokens=far, causal=config.causal, cu_seqlens=cu_seqlens, bias=bias
        )
    assert bias is not None  # full and MoBA attention without one have kernels of their own
    moba = (config.moba_block_size, config.moba_top_k) if kind == "moba" else None
    return biased_attention(q, k, v, bias, causal=config.causal, cu_seqlens=cu_seqlens, moba=moba)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: int,
    causal: bool,
    cu_seqlens: Tensor,
    bias: ScoreBias | None = None,
) -> Tensor:
    """Each query sees the keys of its document at distances below `window` (Longformer, arXiv 2004.05150, section 3.1).

    Causal: itself and the window - 1 tokens before it; bidirectional: also the window - 1 tokens after it. The first
    `global_tokens` of each document are seen by all its queries (causally if `causal`), and see all of it.
    q [T, Hq, D]; k, v [T, Hkv, D]; cu_seqlens int32 [documents + 1].
    """
    places = find_places(len(q), cu_seqlens)
    mask = Mask(places, places, causal, aligned=True, window=window)
    if not global_tokens:
        return masked_attention(q, k, v, mask, bias)
    far = global_indices(cu_seqlens, global_tokens)
    mask = replace(mask, global_tokens=global_tokens, far_keys=far)
    out = masked_attention(q, k, v, mask, bias)
    if causal:  # all that a global token may see are the global tokens before it
        return out
    rows = far.clamp(min=0)
    everything = Mask(places.at(rows), places, causal, aligned=False)
    out_far = masked_attention(q[rows], k, v, everything, bias)
    spare = torch.where(far < 0, len(q), far)  # a row past the end takes what belongs to no token
    return torch.cat((out, out.new_zeros(1, *out.shape[1:]))).index_copy(0, spare, out_far)[:-1]


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ScoreBias,
    *,
    causal: bool,
    cu_seqlens: Tensor,
    moba: tuple[int, int] | None = None,
) -> Tensor:
    """Full or MoBA attention with a bias on the scores of the keys that are seen, not on those of MoBA's gate.

    moba: (block_size, top_k), None: full attention. q [T, Hq, D]; k, v [T, Hkv, D]; cu_seqlens int32 [documents + 1].
    """
    places, routes = find_places(len(q), cu_seqlens), None
    if moba is not None:
        block_size, top_k = moba
        means = block_means(k, block_size=block_size, cu_seqlens=cu_seqlens)
        blocks = route(q, means, block_size=block_size, top_k=top_k, causal=causal, cu_seqlens=cu_seqlens)
        routes = find_routes(blocks, places, cu_seqlens, block_size, len(means))
    return masked_attention(q, k, v, Mask(places, places, causal, aligned=True, routes=routes), bias)


def find_routes(blocks: Tensor, keys: Places, cu_seqlens_k: Tensor, block_size: int, num_blocks: int) -> Routes:
    """MoBA's choice `blocks` (moba.route) with the block of every key; blocks restart at each document."""
    first_block = F.pad(((cu_seqlens_k.diff().long() + block_size - 1) // block_size).cumsum(0), (1, 0))
    return Routes(blocks, first_block[keys.document] + keys.position // block_size, num_blocks)


def global_indices(cu_seqlens: Tensor, count: int) -> Tensor:
    """Indices of the first `count` tokens of each document, int64 [documents * count], -1 where it is shorter."""
    index = cu_seqlens[:-1, None].long() + torch.arange(count, device=cu_seqlens.device)
    return torch.where(index < cu_seqlens[1:, None], index, -1).flatten()
