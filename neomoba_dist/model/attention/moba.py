"""MoBA, Mixture of Block Attention: each query attends to its current block of keys and to the best few other blocks.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2. `moba_attention` is
`block_means` -> `select_blocks` -> `attend`; the parts are public because context parallelism and decoding put their
communication and their caches between them. All implementations share one selection, so they choose the same blocks.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim, N blocks (an upper bound that depends on
shapes only), R rows of the selection per query: Hq for gate "per_head", Hkv for "kv_group".
"""

from __future__ import annotations

from typing import Literal, NamedTuple, NotRequired, TypedDict, overload

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.full import full_attention
from neomoba_dist.model.attention.kernels.layout import Geometry, PlacedBlocks, make_layout, max_blocks
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from neomoba_dist.model.attention.kernels.reference import attend_reference
from neomoba_dist.model.attention.kernels.select import GATES, POOLINGS, pooled_width
from neomoba_dist.parallel.documents import check_cu_seqlens

__all__ = [
    "attend",
    "block_means",
    "check_cu_seqlens",
    "full_attention",
    "moba_attention",
    "place_blocks",
    "select_blocks",
]


class Packing(TypedDict):
    """Where queries and keys lie, as every part takes it."""

    block_size: int
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    q_offset: Tensor | int
    placed: NotRequired[PlacedBlocks | None]


class MobaOptions(NamedTuple):
    """What a MoBA layer is configured with; see moba_attention."""

    block_size: int
    top_k: int
    gate: str = "per_head"
    pooling: str = "mean"

    @classmethod
    def of(cls, config: ModelConfig) -> MobaOptions:
        """From the keys moba_block_size, moba_top_k, moba_gate and moba_pooling."""
        return cls(config.moba_block_size, config.moba_top_k, config.moba_gate, config.moba_pooling)


IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", *LIBRARIES)


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    q_offset: Tensor | int = ...,
    gate: str = ...,
    pooling: str = ...,
    impl: str = ...,
    placed: PlacedBlocks | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    q_offset: Tensor | int = ...,
    gate: str = ...,
    pooling: str = ...,
    impl: str = ...,
    placed: PlacedBlocks | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int = 0,
    gate: str = "per_head",
    pooling: str = "mean",
    impl: str = "auto",
    placed: PlacedBlocks | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of Block Attention over packed documents, scaled by 1 / sqrt(D).

    The current block is always chosen and counts in `top_k`. Causal: it is causally masked and the others are complete
    past blocks. Bidirectional: nothing is masked and the others are any blocks of the document, the short last
    one included. `top_k=1` is the current block alone; a document of at most `top_k` blocks gets full attention.

    Args:
        q: [T, Hq, D]; k, v: [S, Hkv, D], Hkv divides Hq, one floating dtype, D <= 256. Keys already carry positions.
        block_size: tokens per block, >= 1; blocks restart at each document.
        top_k: blocks per query, >= 1.
        cu_seqlens: int32 [documents + 1], borders of the documents among the queries; None: one document. Values are
            checked here on the CPU only; on other devices call `check_cu_seqlens` where the batch is built.
        cu_seqlens_k: the same for the keys; None: as the queries.
        q_offset: position of each document's first query, >= 0: an int or an integer tensor [documents], whose values
            are checked on the CPU only.
        gate: "per_head" (each query head chooses) or "kv_group" (the heads of one KV head choose together).
        pooling: what stands for a block: "mean", "max", "minmax" (Quest bound) or "representative" (last token).
        impl: "reference" (dense mask), "torch" (CPU and any GPU), "triton" (GPU), a library by its name in
            kernels/library/varlen.py (GPU, half precision) or "auto".
        placed: what `place_blocks` found for these borders, which then are not checked again; None: found here.
        return_lse: also return the logsumexp of the scaled logits.

    Returns:
        out [T, Hq, D] in the dtype of q; with `return_lse` also lse [T, Hq] in float32 (float64 for float64). A query
        without any key gets out 0 and lse -inf.

    Raises:
        ValueError: an argument is out of range, or shapes do not match; the message names the argument.
    """
    check_arguments(q, k, v, block_size, top_k, cu_seqlens, cu_seqlens_k, gate, pooling, impl)
    if placed is None:
        check_borders(q, k, cu_seqlens, cu_seqlens_k)
    plain = cu_seqlens_k is None and q_offset_is_zero(q_offset)
    if plain and q.shape[0] == k.shape[0] <= block_size * top_k and not return_lse and impl != "reference":
        return full_attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens, placed=placed)
    packing = Packing(
        block_size=block_size, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, q_offset=q_offset, placed=placed
    )
    cu_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if top_k > 1:
        means = block_means(k, block_size=block_size, cu_seqlens=cu_keys, pooling=pooling, placed=placed)
    else:  # `select_blocks` looks at their shape alone
        documents = 1 if cu_keys is None else cu_keys.shape[0] - 1
        blocks = max_blocks(k.shape[0], block_size, documents)
        means = k.new_empty(blocks, k.shape[1], pooled_width(k.shape[2], pooling))
    block_indices = select_blocks(
        q, means, top_k=top_k, causal=causal, gate=gate, pooling=pooling, num_keys=k.shape[0], **packing
    )
    out, lse = attend(q, k, v, block_indices, causal=causal, impl=impl, **packing)
    return (out, lse) if return_lse else out


def place_blocks(
    cu_seqlens: Tensor,
    tokens: int,
    *,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    impl: str = "auto",
) -> PlacedBlocks:
    """What all MoBA layers derive from the borders of one micro-batch, so that none does it again.

    Args:
        cu_seqlens: int32 [documents + 1], among both queries and keys; from 0 to `tokens`, checked on the CPU only.
        block_size, impl: as in `moba_attention`.
        head_dim, dtype: those of the queries.
    """
    if cu_seqlens.device.type == "cpu":
        check_cu_seqlens(cu_seqlens, tokens)
    layout = make_layout(tokens, tokens, block_size, cu_seqlens, None, None, cu_seqlens.device)
    return ops.place_blocks(layout, head_dim, dtype, impl)


def block_means(
    k: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    pooling: str = "mean",
    placed: PlacedBlocks | None = None,
) -> Tensor:
    """What stands for each block at the gate: [N, Hkv, D] in the key dtype, without gradient ("minmax": [N, Hkv, 2 D]).

    Blocks of all documents are numbered consecutively; a short last block is pooled over its true length. N is an upper
    bound, `max_blocks(S, block_size, documents)`; rows past the last block are zero.
    """
    return ops.block_means(k.detach(), block_size, cu_seqlens, pooling, placed.table if placed else None)


def select_blocks(
    q: Tensor,
    means: Tensor,
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int = 0,
    num_keys: int | None = None,
    gate: str = "per_head",
    pooling: str = "mean",
    placed: PlacedBlocks | None = None,
) -> Tensor:
    """The blocks that each query attends to: int32 [T, R, min(top_k, N)], -1 where there is none, without gradient.

    Column 0 is the query's current block. The others follow by falling score, ties to the higher block index. Scores
    are plain dot products in float32 (float64 for float64), never held as [N, heads, T].

    Args:
        q: [T, Hq, D].
        means: [N, Hkv, D] from `block_means`, perhaps gathered from other ranks; for top_k 1 only the shape counts.
        num_keys: S, needed where q_offset or the keys make it differ from T; None: T.
        others: as in `moba_attention`.
    """
    total = q.shape[0] if num_keys is None else num_keys
    offset = offset_tensor(q_offset, q, cu_seqlens)
    geometry = Geometry.of(block_size, causal, cu_seqlens, cu_seqlens_k, offset, placed=placed)
    return ops.select_blocks(q.detach(), means.detach(), total, top_k, gate, pooling, *geometry)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int = 0,
    impl: str = "auto",
    placed: PlacedBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its selected blocks, differentiable through both results.

    Args:
        q: [T, Hq, D]; k, v: [S, Hkv, D].
        block_indices: int32 [T, R, columns]; column 0 holds the query's current block or -1 and is causally masked if
            `causal`; the blocks of the other columns are attended whole. -1 is no block; none stands twice in a row.
        others: as in `moba_attention`.

    Returns:
        out [T, Hq, D] in the dtype of q and lse [T, Hq] of the scaled logits in float32 (float64 for float64).
    """
    offset = offset_tensor(q_offset, q, cu_seqlens)
    if impl == "reference":
        layout = make_layout(q.shape[0], k.shape[0], block_size, cu_seqlens, cu_seqlens_k, offset, q.device)
        return attend_reference(q, k, v, block_indices, layout, causal=causal)
    geometry = Geometry.of(block_size, causal, cu_seqlens, cu_seqlens_k, offset, placed=placed)
    return ops.attend(q, k, v, block_indices, *geometry, impl)[:2]


def q_offset_is_zero(q_offset: Tensor | int) -> bool:
    """True for the integer 0; a tensor's values are not looked at."""
    return not isinstance(q_offset, Tensor) and q_offset == 0


def offset_tensor(q_offset: Tensor | int, q: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """`q_offset` as [documents] on the device of q, None for 0. Raises ValueError, see `moba_attention`."""
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(q_offset, Tensor):
        dtype = q_offset.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or q_offset.shape != (documents,):
            raise ValueError(f"q_offset must be integers [{documents}], got {dtype} {list(q_offset.shape)}")
        on_host = q_offset.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and documents and int(q_offset.min()) < 0:
            raise ValueError(f"q_offset must not be negative, got {int(q_offset.min())}")
        return q_offset
    if not isinstance(q_offset, int) or q_offset < 0:
        raise ValueError(f"q_offset must be an int of at least 0 or a tensor, got {q_offset!r}")
    return torch.full((documents,), q_offset, device=q.device) if q_offset else None


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    top_k: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    gate: str,
    pooling: str,
    impl: str,
) -> None:
    """Raise a ValueError that names the argument."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1 (the current block counts), got {top_k}")
    for name, value, known in (("gate", gate, GATES), ("pooling", pooling, POOLINGS), ("impl", impl, IMPLEMENTATIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be [T, Hq, D] and k, v [S, Hkv, D], got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k ({k.shape[1]}) must divide the heads of q ({q.shape[1]})")
    if not 1 <= q.shape[2] <= 256:
        raise ValueError(f"the head_dim of q must be 1 to 256, got {q.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if cu_seqlens is not None and cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"cu_seqlens_k is needed when k ({k.shape[0]} tokens) and q ({q.shape[0]}) differ in length")
    if cu_seqlens_k is not None and (cu_seqlens is None or cu_seqlens_k.shape != cu_seqlens.shape):
        raise ValueError("cu_seqlens_k needs cu_seqlens of the same shape")


def check_borders(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Raise a ValueError where borders do not fit; their values are read on the CPU only."""
    if torch.compiler.is_compiling():
        return
    for name, borders, total in (("cu_seqlens", cu_seqlens, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        if borders is not None and borders.device.type == "cpu":
            check_cu_seqlens(borders, total, name)
