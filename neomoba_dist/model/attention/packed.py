"""What attention derives from the positions and borders of one micro-batch: made once for all layers of a stage.

It travels behind the State (model/block.py), from layer to layer, but not to other pipeline stages: they make theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.context.merge import Exchange, Exchanges
from neomoba_dist.model.attention.kernels.layout import PlacedBlocks, packed_positions
from neomoba_dist.model.attention.key_conv import inside_documents
from neomoba_dist.model.attention.moba import place_blocks
from neomoba_dist.model.positions import rope_tables, sliding_rope
from neomoba_dist.parallel.context_split import context_split
from neomoba_dist.parallel.mesh import Mesh


class Memory(NamedTuple):
    """What a decoder attends to: the final states of its encoder's tokens on this rank, [M, H], and the borders of
    their documents, int32 [documents + 1]."""

    states_MH: Tensor
    cu_seqlens: Tensor


class PackedTokens(NamedTuple):
    """T tokens of a micro-batch, of which S lie on this rank; what is None, layers find out by themselves.

    cu_seqlens: borders of the documents among all T tokens, int32 [documents + 1]. rope: `positions.rope_tables` of the
    S tokens; sliding_rope: those of sliding-window layers. placed: documents and blocks of the T tokens. positions:
    their documents and positions within them, int64 [2, T], for windows and biases. inside: which neighbours' keys
    each of the S tokens may take, bool [width, S] (`key_conv.inside_documents`). draws: what dropout's masks of each
    of this rank's tokens are drawn from, int64 (`dropout.draws_of_tokens`). exchange: under context parallelism, see
    `Exchanges.of`. token_types: of the S tokens, and pairs: `Batch.pairs`, both for layers outside of blocks
    (model/segments.py) and of few shapes, or torch.compile would make a graph for each. memory: of a decoder.
    """

    cu_seqlens: Tensor
    rope: tuple[Tensor, Tensor] | None = None
    sliding_rope: tuple[Tensor, Tensor] | None = None
    placed: PlacedBlocks | None = None
    positions: Tensor | None = None
    inside: Tensor | None = None
    draws: Tensor | None = None
    exchange: Callable[..., Exchange] | None = None  # a method: ZeRO-3 walks through what layers return
    memory: Memory | None = None
    token_types: Tensor | None = None
    pairs: Tensor | None = None

    @classmethod
    def of(
        cls,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        config: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        draws: Tensor | None = None,
    ) -> PackedTokens:
        """All that the layers of a model need.

        position_ids: of this rank's tokens, int64 [S]. dtype: of the hidden states. draws: in training with dropout.
        """
        assert config.head_dim is not None  # resolved by ModelConfig
        kinds, device, here = config.layer_attentions, cu_seqlens.device, len(position_ids)
        split = context_split(here, mesh, config) if mesh["cp"].size > 1 else None
        total = here if split is None else split.num_tokens
        placed = positions = inside = exchange = None
        if "moba" in kinds or device.type == "cpu":  # there also for full attention
            size = config.moba_block_size
            placed = place_blocks(cu_seqlens, total, block_size=size, head_dim=config.head_dim, dtype=dtype)
            placed = _sized_by_documents(placed, cu_seqlens)
        if "sliding_window" in kinds or config.position_embedding in ("alibi", "t5_relative"):
            positions = packed_positions(total, cu_seqlens)
        if config.key_conv_width:
            inside = inside_documents(here, cu_seqlens, config.key_conv_width, config.causal, mesh, split)
        if split is not None:
            exchange = Exchanges(cu_seqlens, mesh, config.causal, placed).of
        return cls(cu_seqlens, *_ropes(position_ids, config, dtype), placed, positions, inside, draws, exchange)

    @classmethod
    def of_step(cls, position_ids: Tensor, cu_seqlens: Tensor, config: ModelConfig, dtype: torch.dtype) -> PackedTokens:
        """The same for a step of decoding, whose earlier keys lie in caches, where they are known by other borders."""
        return cls(cu_seqlens, *_ropes(position_ids, config, dtype))


def _ropes(
    position_ids: Tensor, config: ModelConfig, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Tables of all layers but those with sliding windows, and of these; made once where they are the same."""
    if config.position_embedding != "rope":
        return None, None
    tables = rope_tables(position_ids, config, dtype)
    if config.sliding_rope_theta is None:
        return tables, tables
    return tables, rope_tables(position_ids, sliding_rope(config), dtype)


def _sized_by_documents(placed: PlacedBlocks, cu_seqlens: Tensor) -> PlacedBlocks:
    """For torch.compile, to which the number of borders may have been declared as one that changes (train/engines)."""
    if getattr(cu_seqlens, "_dynamo_weak_dynamic_indices", None):
        for tensor, dim in zip(placed, (1, 0, 0, 0), strict=True):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return placed
