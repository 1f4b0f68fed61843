"""Sliding windows and biases on the scores: which keys each query sees; kernels/mask_chunks.py computes.

Exact, but not the fastest. Legend: T queries, S keys, Hq/Hkv query and KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.kernels.layout import PlacedBlocks, packed_positions
from neomoba_dist.model.attention.kernels.masks import Mask, masked_attention
from neomoba_dist.model.attention.moba import MobaOptions, block_means, select_blocks
from neomoba_dist.model.positions import ScoreBias


def bias_weight(bias: ScoreBias | None, device: torch.device) -> Tensor | None:
    """What masked_attention takes of a bias."""
    return None if bias is None else bias.weight(device)


def unusual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    config: ModelConfig,
    bias: ScoreBias | None,
    cu_seqlens: Tensor,
    positions: Tensor | None = None,
    placed: PlacedBlocks | None = None,
) -> Tensor:
    """The core of a sliding-window layer, or of a layer of any kind with a bias on its scores.

    positions, placed: what is known of the tokens, see packed.PackedTokens.
    """
    common: dict[str, Any] = {"causal": config.causal, "cu_seqlens": cu_seqlens, "positions": positions}
    if kind == "sliding_window":
        window, far = config.sliding_window, config.global_tokens
        return sliding_window_attention(q, k, v, window=window, global_tokens=far, bias=bias, **common)
    assert bias is not None  # full and MoBA attention without one have kernels of their own
    moba = MobaOptions.of(config) if kind == "moba" else None
    return biased_attention(q, k, v, bias, moba=moba, placed=placed, **common)


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
    positions: Tensor | None = None,
) -> Tensor:
    """Each query sees the keys of its document at distances below `window` (Longformer, arXiv 2004.05150, section 3.1).

    Causal: itself and the window - 1 tokens before it; bidirectional: also the window - 1 tokens after it. The first
    `global_tokens` of each document are seen by all its queries (causally if `causal`), and see all of it.
    q [T, Hq, D]; k, v [T, Hkv, D]; cu_seqlens int32 [documents + 1]; positions: `packed_positions`, where known.
    """
    positions = packed_positions(len(q), cu_seqlens) if positions is None else positions
    weight = bias_weight(bias, q.device)
    mask = Mask(positions, positions, causal, aligned=True, window=window)
    if not global_tokens:
        return masked_attention(q, k, v, mask, weight)
    far = global_indices(cu_seqlens, global_tokens)
    out = masked_attention(q, k, v, mask._replace(global_tokens=global_tokens, far_keys=far), weight)
    if causal:  # all that a global token may see are the global tokens before it
        return out
    rows = far.clamp(min=0)
    everything = Mask(positions[:, rows], positions, causal, aligned=False)
    out_far = masked_attention(q[rows], k, v, everything, weight)
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
    moba: MobaOptions | None = None,
    positions: Tensor | None = None,
    placed: PlacedBlocks | None = None,
) -> Tensor:
    """Full or MoBA attention with a bias on the scores of the keys that are seen, not on those of MoBA's gate.

    moba: None: full attention. q [T, Hq, D]; k, v [T, Hkv, D]; cu_seqlens int32 [documents + 1]; positions, placed:
    `packed_positions` and `moba.place_blocks`, where known.
    """
    positions = packed_positions(len(q), cu_seqlens) if positions is None else positions
    mask = Mask(positions, positions, causal, aligned=True)
    if moba is not None:
        known: dict[str, Any] = {"cu_seqlens": cu_seqlens, "placed": placed}
        means = block_means(k, block_size=moba.block_size, pooling=moba.pooling, **known)
        blocks = select_blocks(q, means, **moba._asdict(), causal=causal, **known)
        mask = with_block_indices(mask, blocks, q.shape[1], cu_seqlens, moba.block_size, len(means))
    return masked_attention(q, k, v, mask, bias_weight(bias, q.device))


def with_block_indices(
    mask: Mask, blocks: Tensor, num_heads: int, cu_seqlens_k: Tensor, block_size: int, num_blocks: int
) -> Mask:
    """`mask` narrowed to MoBA's choice `blocks` (moba.select_blocks); blocks restart at each document."""
    blocks = blocks.repeat_interleave(num_heads // blocks.shape[1], dim=1)
    first_block = F.pad(((cu_seqlens_k.diff().long() + block_size - 1) // block_size).cumsum(0), (1, 0))
    document, position = mask.keys
    key_block = first_block[document] + position // block_size
    return mask._replace(blocks=blocks, key_block=key_block, num_blocks=num_blocks)


def global_indices(cu_seqlens: Tensor, count: int) -> Tensor:
    """Indices of the first `count` tokens of each document, int64 [documents * count], -1 where it is shorter."""
    index = cu_seqlens[:-1, None].long() + torch.arange(count, device=cu_seqlens.device)
    return torch.where(index < cu_seqlens[1:, None], index, -1).flatten()
