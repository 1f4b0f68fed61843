"""Keys and values of the tokens so far, for decoding a batch of documents of different lengths.

Every document owns `capacity` consecutive tokens of a packed buffer; what lies beyond its length is zero and, as
the model is causal, is seen by no query. So the buffers serve the attention functions as they are, with `borders` as
the keys' cu_seqlens. MoBA layers also keep the means of complete blocks, computed once, when the block is complete,
from the cached keys: decoding then chooses the same blocks as a whole pass. A key convolution keeps its tail.

Shape letters: T new tokens, S tokens of all capacities, N KV heads of this rank, D head size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.kernels.full import attend_documents
from neomoba_dist.model.attention.kernels.layout import packed_positions
from neomoba_dist.model.attention.kernels.masks import Mask, masked_attention
from neomoba_dist.model.attention.key_conv import add_taps
from neomoba_dist.model.attention.moba import MobaOptions, Packing, attend, block_means, moba_attention, select_blocks
from neomoba_dist.model.attention.sliding_window import bias_weight, with_block_indices
from neomoba_dist.model.positions import ScoreBias


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one step go; the same for all layers.

    first: no document has earlier tokens. offset: position of each document's first new token, int64 [documents].
    counts: new tokens of each document, the same. positions: document and position of every new token, int64 [2, T].
    target: row of every new token in the buffers, int64 [T]. near: rows of the keys that a sliding-window layer's new
    queries can see, int64 [K], empty where there is no such layer. numbers, block_keys: blocks that these tokens
    complete, int64 [n], and the rows of their keys [n * block_size]. document_ranges: for each document with new
    tokens the rows of its new queries, and those of all its keys so far in the buffers.
    """

    first: bool
    offset: Tensor
    counts: Tensor
    positions: Tensor
    target: Tensor
    near: Tensor
    numbers: Tensor
    block_keys: Tensor
    document_ranges: list[tuple[slice, slice]]


class KVCache:
    """The caches of the layers of one stage and where the documents stand.

    kinds: attention of each of those layers; it overrides what the layer runs in training. num_kv_heads: of this rank.
    capacities: most tokens of every document. `step`: the tokens that are on their way through the layers.
    """

    step: Step

    def __init__(
        self,
        config: ModelConfig,
        kinds: Sequence[str],
        num_kv_heads: int,
        capacities: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.capacities, self.lengths = list(capacities), [0] * len(capacities)
        self.borders = torch.tensor([0, *accumulate(capacities)], dtype=torch.int32, device=device)
        self.layers = [self.make_layer(kind, num_kv_heads, dtype) for kind in kinds]

    def make_layer(self, kind: str, num_kv_heads: int, dtype: torch.dtype) -> LayerCache:
        """The cache of one layer."""
        return LayerCache(self, kind, num_kv_heads, dtype)

    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.buffers())

    def begin(self, counts: Sequence[int]) -> Tensor:
        """Announce `counts` new tokens of every document; returns their positions, int64 [T].

        Raises ValueError where they do not fit.
        """
        before, after = self.lengths, [a + b for a, b in zip(self.lengths, counts, strict=True)]
        for document, (length, capacity) in enumerate(zip(after, self.capacities, strict=True)):
            if length > capacity:
                added = f"{before[document]} + {counts[document]}"
                raise ValueError(f"document {document}: {added} tokens do not fit a cache of {capacity}")
        offset = torch.tensor(before, device=self.device)
        borders = torch.tensor([0, *accumulate(counts)], device=self.device)
        positions = packed_positions(sum(counts), borders, offset)
        document, position = positions
        self.step = Step(
            not any(before),
            offset,
            torch.tensor(counts, device=self.device),
            positions,
            self.borders.long()[document] + position,
            self._near_rows(before, after),
            *self._completed_blocks(before, after),
            self._document_ranges(counts, after),
        )
        self.lengths = after
        return position

    def _document_ranges(self, counts: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]]:
        starts = zip(accumulate(counts, initial=0), accumulate(self.capacities, initial=0), counts, after, strict=False)
        return [(slice(q, q + new), slice(k, k + length)) for q, k, new, length in starts if new]

    def _near_rows(self, before: Sequence[int], after: Sequence[int]) -> Tensor:
        """For every document with new tokens: its global tokens and all from the first new one's window on."""
        parts = [torch.arange(0)]
        if any(layer.kind == "sliding_window" for layer in self.layers):
            for a, b, border in zip(before, after, self.borders.tolist(), strict=False):
                low = max(0, a - self.config.sliding_window + 1) if b > a else b
                far = min(self.config.global_tokens, low) if b > a else 0
                parts += [torch.arange(border, border + far), torch.arange(border + low, border + b)]
        return torch.cat(parts).to(self.device)

    def _completed_blocks(self, before: Sequence[int], after: Sequence[int]) -> tuple[Tensor, Tensor]:
        size = self.config.moba_block_size
        first_blocks = accumulate((-(-capacity // size) for capacity in self.capacities), initial=0)
        numbers, starts = [], []
        for a, b, first, border in zip(before, after, first_blocks, self.borders.tolist(), strict=False):
            numbers += [first + block for block in range(a // size, b // size)]
            starts += [border + block * size for block in range(a // size, b // size)]
        rows = torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(size)
        return torch.tensor(numbers, dtype=torch.int64, device=self.device), rows.flatten().to(self.device)


class LayerCache:
    """What one attention layer keeps.

    prefill_kind: attention of the first step, by default as later. k, v [S, N, D]; means [blocks, N, D] of a MoBA
    layer; tail [documents, W-1, N, D] of a key convolution: the keys before it. memory: keys and values of an encoder's
    tokens, [E, N, D] each, in a layer with cross attention, which makes them.
    """

    def __init__(self, cache: KVCache, kind: str, num_kv_heads: int, dtype: torch.dtype) -> None:
        config = cache.config
        assert config.head_dim is not None  # resolved by ModelConfig
        self.cache, self.kind, self.prefill_kind = cache, kind, kind
        heads = (num_kv_heads, config.head_dim)
        self.k, self.means = self._make_buffers(heads, dtype)
        self.v = torch.zeros_like(self.k)
        tail = max(config.key_conv_width - 1, 0)
        self.tail = self.k.new_zeros(len(cache.capacities), tail, *heads)
        self.memory: tuple[Tensor, Tensor] | None = None

    def _make_buffers(self, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Zeros for the keys and, in a MoBA layer, for the means of all blocks."""
        cache, (number, dim) = self.cache, heads
        # the keys of one head lie together: what decoding reads, token after token
        keys = torch.zeros(number, sum(cache.capacities), dim, dtype=dtype, device=cache.device).transpose(0, 1)
        size = cache.config.moba_block_size
        if self.kind != "moba":
            return keys, None
        pooling = cache.config.moba_pooling
        return keys, block_means(keys, block_size=size, cu_seqlens=cache.borders, pooling=pooling)

    def buffers(self) -> list[Tensor]:
        """All tensors that it keeps."""
        return [self.k, self.v, self.tail, *([] if self.means is None else [self.means]), *(self.memory or ())]

    def convolve(self, k_TND: Tensor, weight_CW: Tensor) -> Tensor:
        """The key convolution of the new keys with those before them; keeps the new tail."""
        step, tail = self.cache.step, self.tail.shape[1]
        known = torch.cat((k_TND.new_zeros(1, *k_TND.shape[1:]), self.tail.flatten(0, 1), k_TND))

        def row_of(document: Tensor, position: Tensor, token: Tensor) -> Tensor:
            """Row of `known` that holds a position: in the new keys at `token`, in the tail, or (row 0) before all."""
            back = position - step.offset[document]  # negative: an earlier token
            old = 1 + document * tail + tail + back
            return torch.where(back >= 0, 1 + len(self.tail) * tail + token, torch.where(position >= 0, old, 0))

        (document, position), token = step.positions, torch.arange(len(k_TND), device=k_TND.device)
        out = add_taps(k_TND, weight_CW, True, lambda o: known[row_of(document, position + o, token + o)])
        document = torch.arange(len(self.tail), device=k_TND.device)[:, None]
        back = torch.arange(-tail, 0, device=k_TND.device)
        end, last = (step.offset + step.counts)[:, None], step.counts.cumsum(0)[:, None]
        self.tail = known[row_of(document, end + back, last + back)]
        return out

    def extend(self, k_TND: Tensor, v_TND: Tensor) -> bool:
        """Take the new keys and values. Returns whether there were any before."""
        step, size = self.cache.step, self.cache.config.moba_block_size
        self.k[step.target], self.v[step.target] = k_TND, v_TND
        if self.means is not None and len(step.numbers):
            self.means[step.numbers] = self._means_of(step.block_keys, size)
        return not step.first

    def _means_of(self, rows: Tensor, size: int) -> Tensor:
        """The means of whole blocks, from the rows of their keys."""
        pooling = self.cache.config.moba_pooling
        keys = self.k[rows].contiguous()  # as a whole pass has them: the same bits
        return block_means(keys, block_size=size, pooling=pooling)[: len(rows) // size]

    def attend(self, q: Tensor, cu_seqlens: Tensor, bias: ScoreBias | None) -> Tensor:
        """Attention of the new queries [T, heads, D] to all tokens so far, as a whole pass computes it."""
        config, step, borders = self.cache.config, self.cache.step, self.cache.borders
        size, weight = config.moba_block_size, bias_weight(bias, q.device)
        if self.kind == "sliding_window":
            keys = packed_positions(len(self.k), borders)[:, step.near]
            window, far = config.sliding_window, config.global_tokens
            mask = Mask(step.positions, keys, True, aligned=False, window=window, global_tokens=far)
            return masked_attention(q, self.k[step.near], self.v[step.near], mask, weight)
        packing = Packing(block_size=size, cu_seqlens=cu_seqlens, cu_seqlens_k=borders, q_offset=step.offset)
        blocks = None
        if self.means is not None:
            options = MobaOptions.of(config)
            blocks = select_blocks(
                q,
                self.means,
                top_k=options.top_k,
                gate=options.gate,
                pooling=options.pooling,
                num_keys=len(self.k),
                **packing,
            )
        if bias is not None:
            mask = Mask(step.positions, packed_positions(len(self.k), borders), True, aligned=False)
            if blocks is not None and self.means is not None:
                mask = with_block_indices(mask, blocks, q.shape[1], borders, size, len(self.means))
            return masked_attention(q, self.k, self.v, mask, weight)
        if blocks is not None:
            return attend(q, self.k, self.v, blocks, **packing)[0]
        if q.device.type != "cpu" or len(q) == len(step.document_ranges):  # one new token each
            return attend_documents(q, self.k, self.v, step.document_ranges)
        # one block as long as the longest document is full attention
        packing["block_size"] = max(self.cache.capacities)
        return moba_attention(q, self.k, self.v, top_k=1, **packing)
