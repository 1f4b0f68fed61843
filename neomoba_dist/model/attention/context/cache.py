"""The cache of decoding when keys are spread over context-parallel ranks: every rank keeps its blocks of each document.

All ranks compute the new tokens; a key lies on the rank that its block falls to in turn, so that a block's mean is one
rank's affair. Queries attend to the keys that are here, and the ranks' outputs are merged by their logsumexp.

Shape letters: T new tokens, S tokens that this rank has room for, C ranks, N KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.cache import KVCache, LayerCache
from neomoba_dist.model.attention.kernels.layout import find_positions, max_blocks, packed_positions
from neomoba_dist.model.attention.kernels.masks import Mask, attend_with_lse
from neomoba_dist.model.attention.kernels.select import pooled_width
from neomoba_dist.model.attention.moba import MobaOptions, select_blocks
from neomoba_dist.model.attention.sliding_window import with_block_indices
from neomoba_dist.model.positions import ScoreBias
from neomoba_dist.parallel.comm import all_gather, all_reduce
from neomoba_dist.parallel.context import gather_tokens
from neomoba_dist.parallel.context_split import ContextSplit
from neomoba_dist.parallel.mesh import Mesh


class ShardedKVCache(KVCache):
    """A KVCache whose layers hold this rank's share. Blocks of `moba_block_size` tokens go to the ranks in turn.

    key_positions: document and position of every local row, int64 [2, S]. Of the tokens on their way: which of them
    stay here and where, `kept` and `rows`; which of the blocks that they complete, `local_blocks` and `block_rows`.
    prefilling: how the tokens of a first step lie that each rank computes a share of; None: every rank has them all.
    """

    prefilling: ContextSplit | None = None

    kept: Tensor
    rows: Tensor
    local_blocks: Tensor
    block_rows: Tensor

    def __init__(
        self,
        config: ModelConfig,
        kinds: Sequence[str],
        num_kv_heads: int,
        capacities: Sequence[int],
        dtype: torch.dtype,
        mesh: Mesh,
    ) -> None:
        self.mesh, self.turn = mesh, config.moba_block_size * mesh["cp"].size
        room = [-(-capacity // self.turn) * config.moba_block_size for capacity in capacities]
        self.local_borders = torch.tensor([0, *accumulate(room)], dtype=torch.int32, device=mesh.device)
        document, place = packed_positions(sum(room), self.local_borders)
        size, rank = config.moba_block_size, mesh["cp"].index
        self.key_positions = torch.stack((document, place // size * self.turn + rank * size + place % size))
        super().__init__(config, kinds, num_kv_heads, capacities, dtype, mesh.device)

    def make_layer(self, kind: str, num_kv_heads: int, dtype: torch.dtype) -> LayerCache:
        """The cache of one layer."""
        return ShardedLayerCache(self, kind, num_kv_heads, dtype)

    def begin(self, counts: Sequence[int]) -> Tensor:
        """See KVCache.begin; the same counts on all ranks."""
        position_ids = super().begin(counts)
        self.kept, self.rows = self._local(*self.step.positions)
        size, borders = self.config.moba_block_size, self.borders.long()
        first = self.step.block_keys[::size]
        self.local_blocks, starts = self._local(*find_positions(first, borders))
        self.block_rows = (starts[:, None] + torch.arange(size, device=self.device)).flatten()
        return position_ids

    def _local(self, document: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens lie on this rank, and in which rows."""
        size = self.config.moba_block_size
        kept = (position % self.turn // size == self.mesh["cp"].index).nonzero()[:, 0]
        document, position = document[kept], position[kept]
        return kept, self.local_borders.long()[document] + position // self.turn * size + position % size


class ShardedLayerCache(LayerCache):
    """What one attention layer keeps on this rank: k, v [S, N, D]; the means of all blocks, on every rank."""

    cache: ShardedKVCache

    def _make_buffers(self, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        cache = self.cache
        keys = torch.zeros(int(cache.local_borders[-1]), *heads, dtype=dtype, device=cache.device)
        blocks = max_blocks(sum(cache.capacities), cache.config.moba_block_size, len(cache.capacities))
        width = pooled_width(heads[1], cache.config.moba_pooling)
        return keys, keys.new_zeros(blocks, heads[0], width) if self.kind == "moba" else None

    def extend(self, k_TND: Tensor, v_TND: Tensor) -> bool:
        """See LayerCache.extend."""
        cache = self.cache
        step, size = cache.step, cache.config.moba_block_size
        self.k[cache.rows], self.v[cache.rows] = k_TND[cache.kept], v_TND[cache.kept]
        if self.means is not None and len(step.numbers):
            known = self.means.new_zeros(len(step.numbers), *self.means.shape[1:])
            known[cache.local_blocks] = self._means_of(cache.block_rows, size)
            self.means[step.numbers] = all_reduce(known, cache.mesh, "cp")  # one rank's and zeros: the same bits
        return not step.first

    def gather(self, x_SND: Tensor) -> Tensor:
        """All tokens of the step from the ranks' shares, without padding: [S, ...] -> [T, ...]."""
        assert self.cache.prefilling is not None
        return gather_tokens(x_SND, self.cache.mesh, "cp", self.cache.prefilling)[: len(self.cache.step.target)]

    def convolve_share(self, k_SND: Tensor, weight_CW: Tensor) -> Tensor:
        """`convolve` where each rank has a share of the tokens."""
        split = self.cache.prefilling
        assert split is not None
        whole = self.convolve(self.gather(k_SND), weight_CW)
        padded = torch.nn.functional.pad(whole, (0, 0, 0, 0, 0, split.num_tokens - len(whole)))
        return padded[split.global_index(self.cache.mesh["cp"].index, whole.device)]

    def attend(self, q: Tensor, cu_seqlens: Tensor, bias: ScoreBias | None) -> Tensor:
        """See LayerCache.attend. bias: None, score biases and context parallelism exclude each other."""
        cache, config, step = self.cache, self.cache.config, self.cache.step
        mask = Mask(step.positions, cache.key_positions, True, aligned=False)
        if self.kind == "sliding_window":
            mask = mask._replace(window=config.sliding_window, global_tokens=config.global_tokens)
        if self.means is not None:
            size, borders, total = config.moba_block_size, cache.borders, sum(cache.capacities)
            blocks = select_blocks(
                q,
                self.means,
                **MobaOptions.of(config)._asdict(),
                cu_seqlens=cu_seqlens,
                cu_seqlens_k=borders,
                q_offset=step.offset,
                num_keys=total,
            )
            mask = with_block_indices(mask, blocks, q.shape[1], borders, size, len(self.means))
            assert mask.key_block is not None
            # rows past a document's capacity are in the future of every query, whatever block they are given
            mask = mask._replace(key_block=mask.key_block.clamp(max=len(self.means) - 1))
        out, lse = attend_with_lse(q, self.k, self.v, mask)
        total_lse = all_gather(lse, cache.mesh, "cp").logsumexp(0)
        return all_reduce(out * (lse - total_lse).exp()[..., None], cache.mesh, "cp").to(q.dtype)
