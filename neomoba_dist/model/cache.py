"""Keys and values of the tokens so far, for decoding a batch of documents of different lengths.

Every document owns a stretch of a packed buffer, `capacity` tokens long; what lies beyond its length is zero and, as
the model is causal, is seen by no query. So the buffers serve the attention functions as they are, with `borders` as
the keys' cu_seqlens. MoBA layers also keep the means of complete blocks, computed once, when the block is complete,
from the cached keys: decoding then chooses the same blocks as a whole pass. A key convolution keeps its tail.

Shape letters: T new tokens, S tokens of all capacities, N KV heads of this rank, D head size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.key_conv import add_taps
from neomoba_dist.model.masked import Mask, find_places, find_routes, masked_attention
from neomoba_dist.model.moba import Places as MobaPlaces
from neomoba_dist.model.moba import attend, block_means, moba_attention, route
from neomoba_dist.model.positions import ScoreBias


class KVCache:
    """The caches of the layers of one stage and where the documents stand.

    kinds: attention of each of those layers; it overrides what the layer runs in training. num_kv_heads: of this rank.
    capacities: most tokens of every document.
    """

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
        self.layers = [LayerCache(self, kind, num_kv_heads, dtype) for kind in kinds]

    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.buffers())

    def begin(self, counts: Sequence[int]) -> Tensor:
        """Announce `counts` new tokens of every document; returns their positions, int64 [T].

        Raises ValueError where they do not fit.
        """
        for document, (length, count, capacity) in enumerate(zip(self.lengths, counts, self.capacities, strict=True)):
            if length + count > capacity:
                raise ValueError(f"document {document}: {length} + {count} tokens do not fit a cache of {capacity}")
        cu_seqlens = torch.tensor([0, *accumulate(counts)], device=self.device)
        self.offset = torch.tensor(self.lengths, device=self.device)
        self.places = find_places(sum(counts), cu_seqlens, self.offset)
        self.target = self.borders.long()[self.places.document] + self.places.position
        self.first = not any(self.lengths)
        self.before, self.lengths = self.lengths, [a + b for a, b in zip(self.lengths, counts, strict=True)]
        return self.places.position

    def completed_blocks(self) -> tuple[Tensor, Tensor]:
        """Blocks that the new tokens completed: (numbers [n], indices of their keys [n * block_size])."""
        size = self.config.moba_block_size
        firsts = [0, *accumulate(-(-capacity // size) for capacity in self.capacities)]
        numbers, starts = [], []
        stretches = zip(self.before, self.lengths, firsts, self.borders.tolist(), strict=False)
        for before, after, first, border in stretches:
            numbers += [first + block for block in range(before // size, after // size)]
            starts += [border + block * size for block in range(before // size, after // size)]
        index = torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(size)
        return torch.tensor(numbers, dtype=torch.int64, device=self.device), index.flatten().to(self.device)


class LayerCache:
    """What one attention layer keeps. k, v [S, N, D]; means [blocks, N, D] of a MoBA layer; tail [documents, W-1, N, D]
    of a key convolution: the keys before it."""

    def __init__(self, cache: KVCache, kind: str, num_kv_heads: int, dtype: torch.dtype) -> None:
        config = cache.config
        assert config.head_dim is not None  # resolved by ModelConfig
        self.cache, self.kind = cache, kind
        heads = (num_kv_heads, config.head_dim)
        self.k = torch.zeros(sum(cache.capacities), *heads, dtype=dtype, device=cache.device)
        self.v = torch.zeros_like(self.k)
        tail = max(config.key_conv_width - 1, 0)
        self.tail = self.k.new_zeros(len(cache.capacities), tail, *heads)
        size = config.moba_block_size
        # zeros of the right shape
        self.means = block_means(self.k, block_size=size, cu_seqlens=cache.borders) if kind == "moba" else None

    def buffers(self) -> list[Tensor]:
        """All tensors that it keeps."""
        return [self.k, self.v, self.tail, *([] if self.means is None else [self.means])]

    def convolve(self, k_TND: Tensor, weight_CW: Tensor) -> Tensor:
        """The key convolution of the new keys with those before them; keeps the new tail."""
        cache, tail = self.cache, self.tail.shape[1]
        known = torch.cat((k_TND.new_zeros(1, *k_TND.shape[1:]), self.tail.flatten(0, 1), k_TND))

        def row_of(document: Tensor, position: Tensor, token: Tensor) -> Tensor:
            """Row of `known` that holds a position: in the new keys at `token`, in the tail, or (row 0) before all."""
            back = position - cache.offset[document]  # negative: an earlier token
            old = 1 + document * tail + tail + back
            return torch.where(back >= 0, 1 + len(self.tail) * tail + token, torch.where(position >= 0, old, 0))

        places = cache.places
        index = torch.arange(len(k_TND), device=k_TND.device)
        out = add_taps(k_TND, weight_CW, True, lambda o: known[row_of(places.document, places.position + o, index + o)])
        document = torch.arange(len(self.tail), device=k_TND.device)[:, None]
        counts = torch.tensor(cache.lengths, device=k_TND.device)[:, None] - cache.offset[:, None]
        back = torch.arange(-tail, 0, device=k_TND.device)
        ends = counts.cumsum(0)
        self.tail = known[row_of(document, cache.offset[:, None] + counts + back, ends + back)]
        return out

    def extend(self, k_TND: Tensor, v_TND: Tensor) -> bool:
        """Take the new keys and values. Returns whether there were any before."""
        cache = self.cache
        self.k[cache.target], self.v[cache.target] = k_TND, v_TND
        if self.means is not None:
            numbers, index = cache.completed_blocks()
            if len(numbers):
                self.means[numbers] = block_means(self.k[index], block_size=cache.config.moba_block_size)
        return not cache.first

    def attend(self, q: Tensor, cu_seqlens: Tensor, bias: ScoreBias | None) -> Tensor:
        """Attention of the new queries [T, heads, D] to all tokens so far, as a whole pass computes it."""
        cache, config = self.cache, self.cache.config
        size, borders = config.moba_block_size, cache.borders
        places = MobaPlaces(block_size=size, cu_seqlens=cu_seqlens, cu_seqlens_k=borders, q_offset=cache.offset)
        blocks = None
        if self.means is not None:
            blocks = route(q, self.means, top_k=config.moba_top_k, num_keys=len(self.k), **places)
        if self.kind == "sliding_window" or bias is not None:
            keys = find_places(len(self.k), borders)
            window = config.sliding_window if self.kind == "sliding_window" else 0
            mask = Mask(cache.places, keys, True, aligned=False, window=window, global_tokens=config.global_tokens)
            if blocks is not None and self.means is not None:
                routes = find_routes(blocks, keys, borders, size, len(self.means))
                mask = Mask(cache.places, keys, True, aligned=False, routes=routes)
            return masked_attention(q, self.k, self.v, mask, bias)
        if blocks is not None:
            return attend(q, self.k, self.v, blocks, **places)[0]
        # one block as long as the longest document is full attention
        places["block_size"] = max(cache.capacities)
        return moba_attention(q, self.k, self.v, top_k=1, **places)
