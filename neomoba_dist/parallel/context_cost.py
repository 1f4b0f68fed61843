"""What a context-parallel exchange costs: bytes received per rank and layer, and who computes how many pairs.

Tests hold the communication ledger to these formulas, and they choose where the configuration says "auto".

Legend: T tokens of the batch, S tokens of one rank, C ranks, p = (C - 1) / C, Hq / Hkv heads of one tensor-parallel
rank, D head size, e bytes of an element, k blocks per query (the own block included).
"""

from dataclasses import dataclass, replace
from itertools import accumulate

from neomoba_dist.config.context import FULL_STRATEGIES, MOBA_STRATEGIES, possible, ulysses_ranks
from neomoba_dist.parallel.context_split import ContextSplit


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one tensor-parallel rank, head size, bytes of an element, and MoBA's block size and top k."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_size: int
    block_size: int
    top_k: int


def received_bytes(strategy: str, shape: AttentionShape, local_tokens: int, ranks: int) -> tuple[float, float]:
    """(forward, backward) bytes that a rank receives in one layer, without activation checkpointing.

    "route_queries" is an upper bound: a query that chose two blocks of one rank travels there once.
    """
    name = strategy.removeprefix("ulysses+")
    if name != strategy:
        inner = ulysses_ranks(ranks, shape.kv_heads)
        heads = replace(shape, query_heads=shape.query_heads // inner, kv_heads=shape.kv_heads // inner)
        parts = (
            received_bytes("ulysses", shape, local_tokens, inner),
            received_bytes(name, heads, local_tokens * inner, ranks // inner),
        )
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    share, row, statistic = (ranks - 1) / ranks, shape.head_dim * shape.element_size, max(4, shape.element_size)
    if name == "ulysses":
        one_way = (2 * shape.query_heads + 2 * shape.kv_heads) * row * local_tokens * share
        return one_way, one_way
    if name == "route_queries":
        sent = local_tokens * shape.query_heads * (shape.top_k - 1) * share
        forward = sent * (2 * row + statistic + 4)  # queries and the number of a block; outputs and their lse
        return means_bytes(shape, local_tokens, ranks) + forward, sent * (2 * row + 2 * statistic)
    keys = 2 * shape.kv_heads * row * local_tokens * (ranks - 1)
    # a ring's gradients of keys travel as sums, in float32 for half precision
    back = keys * max(1, 4 // shape.element_size) if name == "ring" else keys
    return keys, keys + back


def means_bytes(shape: AttentionShape, local_tokens: int, ranks: int) -> float:
    """Bytes of the gate: what an all-gather of block means, in float32 (float64 for float64), brings to a rank."""
    means = local_tokens / shape.block_size * shape.kv_heads * shape.head_dim
    return means * max(4, shape.element_size) * (ranks - 1)


def choose(kind: str, shape: AttentionShape, local_tokens: int, ranks: int) -> str:
    """The possible strategy with the fewest bytes, forward and backward together, for a "moba" or "full" layer."""
    names = MOBA_STRATEGIES if kind == "moba" else FULL_STRATEGIES
    usable = [name for name in names if possible(name, ranks, shape.kv_heads)]
    return min(usable, key=lambda name: sum(received_bytes(name, shape, local_tokens, ranks)))


def work_imbalance(kind: str, strategy: str, split: ContextSplit, shape: AttentionShape, causal: bool) -> float:
    """Largest / mean number of (query, key) pairs of a rank, for one document that fills the batch.

    MoBA's queries are taken to choose evenly among the blocks they may choose. Under "ulysses" every rank computes all
    tokens of its heads; "route_queries" computes where the keys are, everything else where the queries are.
    """
    inner = ulysses_ranks(split.ranks, shape.kv_heads) if strategy.startswith("ulysses") else 1
    split, size, others = split.merged(inner), shape.block_size, shape.top_k - 1
    blocks = -(-split.num_tokens // size)
    if kind == "full":
        pairs = [position + 0.5 if causal else 1.0 for position in range(blocks)]
    elif strategy.endswith("route_queries"):
        visits = [0.0, *accumulate(min(others, block) / block for block in range(blocks - 1, 0, -1))][::-1]
        pairs = [0.5 + visits[block] if causal else 1.0 for block in range(blocks)]
    else:
        pairs = [0.5 + min(others, block) if causal else 1.0 for block in range(blocks)]
    loads = [0.0] * split.ranks
    for block, load in enumerate(pairs):
        loads[split.owner(block * size // split.unit)] += load
    return max(loads) / (sum(loads) / len(loads))
