"""Attention whose tokens lie on several context-parallel ranks: the strategies, exact for every one of them.

- "ulysses": every rank gets all tokens of some heads, and runs what a single process runs;
- "allgather_kv": keys and values are gathered, some heads at a time, and gradients go back to their owners;
- "ring": keys and values travel from rank to rank while the ranks compute (full attention);
- "route_queries": block means are gathered, queries travel to the keys of their blocks (MoBA);
- "ulysses+...": Ulysses within groups of ranks that share KV heads, one of the others between the groups.

Softmax over parts of the keys is merged by logsumexp, and with the final logsumexp the backward pass of every part is
exact on its own (FlashAttention, arXiv 2205.14135, appendix B). Every query's own segment or piece of a block is on its
own rank, so causal masks are local and whatever travels is attended unmasked.

Legend: S tokens of this rank, T of all ranks, Hq/Hkv query and KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.config.context import possible, ulysses_ranks
from neomoba_dist.model.attention.context.allgather import GatheredAttention, RingAttention
from neomoba_dist.model.attention.context.dispatch import DispatchedQueries
from neomoba_dist.model.attention.context.merge import Exchange, Exchanges
from neomoba_dist.model.attention.kernels.layout import packed_positions
from neomoba_dist.model.attention.moba import MobaOptions
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.attention.sliding_window import sliding_window_attention
from neomoba_dist.model.optional import log_choice
from neomoba_dist.parallel.context import group_order, heads_for_tokens, tokens_for_heads, with_halo
from neomoba_dist.parallel.context_cost import AttentionShape, choose, received_bytes
from neomoba_dist.parallel.context_split import ContextSplit, context_split
from neomoba_dist.parallel.mesh import Mesh

Core = Callable[[Tensor, Tensor, Tensor, PackedTokens], Tensor]
FUNCTIONS: dict[str, Any] = {
    "allgather_kv": GatheredAttention,
    "ring": RingAttention,
    "route_queries": DispatchedQueries,
}


@torch.compiler.disable  # sizes of messages and parts are numbers on the host, other ones with every micro-batch
def context_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedTokens, *, kind: str, config: ModelConfig, mesh: Mesh, core: Core
) -> Tensor:
    """Attention within documents: q [S, Hq, D], k and v [S, Hkv, D] -> [S, Hq, D].

    Args:
        packed: the borders among all T tokens, and what is known of them.
        kind: "full", "moba" or "sliding_window".
        core: (q, k, v, packed) -> output of a process that has all the tokens of its heads.
    """
    split = context_split(len(q), mesh, config)
    strategy = context_strategy(kind, q, k, config, mesh)
    exchange_of = packed.exchange or Exchanges(packed.cu_seqlens, mesh, config.causal).of
    if strategy == "halo":
        return _window_with_halo(q, k, v, exchange_of(split, "cp", None), config)

    def exchanged(q: Tensor, k: Tensor, v: Tensor, split: ContextSplit, axis: str) -> Tensor:
        moba = MobaOptions.of(config) if kind == "moba" else None
        return FUNCTIONS[strategy.removeprefix("ulysses+")].apply(q, k, v, exchange_of(split, axis, moba))

    if not strategy.startswith("ulysses"):
        return exchanged(q, k, v, split, "cp")
    inner = "cp" if strategy == "ulysses" else "cp_heads"
    group = mesh[inner].size
    if group != ulysses_ranks(mesh["cp"].size, k.shape[1]):
        raise ValueError(f"the mesh was built for other KV heads than these {k.shape[1]}: give it num_key_value_heads")
    order = group_order(split, group, mesh["cp"].index // group, q.device)
    q, k, v = tokens_for_heads([q, k, v], mesh, inner, order)
    whole = strategy == "ulysses"
    out = core(q, k, v, packed) if whole else exchanged(q, k, v, split.merged(group), "cp_tokens")
    return heads_for_tokens(out, mesh, inner, order)


def context_strategy(kind: str, q: Tensor, k: Tensor, config: ModelConfig, mesh: Mesh) -> str:
    """The strategy of a layer: the configured one, or for "auto" the cheapest; logged once.

    A sliding window takes Ulysses where the heads suffice, else a "halo" of neighbouring keys.
    """
    ranks = mesh["cp"].size
    if kind == "sliding_window":
        return "ulysses" if possible("ulysses", ranks, k.shape[1]) else "halo"
    strategy = mesh.context_moba if kind == "moba" else mesh.context_full
    if strategy == "auto":
        shape = AttentionShape(
            q.shape[1],
            k.shape[1],
            q.shape[2],
            q.element_size(),
            config.moba_block_size,
            config.moba_top_k,
            config.moba_pooling,
        )
        strategy = choose(kind, shape, len(q), ranks)
        forward, backward = (round(part / 2**20, 2) for part in received_bytes(strategy, shape, len(q), ranks))
        what = f"context parallelism of {kind} attention, {len(q)} tokens on each of {ranks} ranks"
        log_choice(what, f"{strategy} ({forward} + {backward} MiB received per rank and layer)")
    return strategy


def _window_with_halo(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, config: ModelConfig) -> Tensor:
    """A sliding window: every unit with its neighbouring keys is a small batch of documents of its own."""
    split, reach = exchange.split, config.sliding_window - 1
    before, after = reach, 0 if config.causal else reach
    keys, values = with_halo(torch.cat((k, v), dim=1), before, after, exchange.mesh, "cp", split).chunk(2, dim=2)
    queries = torch.nn.functional.pad(q.unflatten(0, (split.units, split.unit)), (0, 0, 0, 0, before, after))
    width = before + split.unit + after
    cu_units, positions = exchange.once(_units_with_halo, before, width)
    out = sliding_window_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        window=config.sliding_window,
        global_tokens=0,
        causal=config.causal,
        cu_seqlens=cu_units,
        positions=positions,
    )
    return out.unflatten(0, (split.units, width))[:, before : before + split.unit].flatten(0, 1)


def _units_with_halo(exchange: Exchange, before: int, width: int) -> tuple[Tensor, Tensor]:
    """Borders int32 and `packed_positions` of this rank's units, each `width` tokens long, from `before` it on."""
    split, borders, cu = exchange.split, sorted(set(exchange.borders)), [0]
    for number, start in enumerate(split.unit_starts(exchange.rank)):
        first, place = start - before, number * width
        cut = [border - first for border in borders if 0 < border - first < width]
        cu.extend(place + position for position in [*cut, width])
    cu_units = torch.tensor(cu, dtype=torch.int32, device=exchange.device)
    return cu_units, packed_positions(cu[-1], cu_units)
