"""What a context-parallel exchange costs: bytes received per rank and layer, and who computes how many pairs.

Tests hold the communication ledger to these formulas, and they choose where the configuration says "auto".

Legend: T tokens of the batch, S tokens of one rank, C ranks, p = (C - 1) / C, Hq / Hkv heads of one tensor-parallel
rank, D head size, e bytes of an element, k blocks per query (the current block included).
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from neomoba_dist.config import Config
from neomoba_dist.config.context import FULL_STRATEGIES, MOBA_STRATEGIES, possible, ulysses_ranks
from neomoba_dist.parallel.context_split import ContextSplit

MOST_HELD = 4.0  # memory is held by one layer at a time, bytes are received by all of them


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one tensor-parallel rank, head size, bytes of an element, and MoBA's block size, top k and pooling."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element_size: int
    block_size: int
    top_k: int
    pooling: str = "mean"

    @classmethod
    def of(cls, config: Config) -> "AttentionShape":
        """Of the configuration's layers."""
        model, tp = config.model, config.parallel.tensor_model_parallel_size
        assert model.head_dim is not None  # resolved by ModelConfig
        heads = (model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp))
        size = 4 if config.dtype_name == "float32" else 2
        return cls(*heads, model.head_dim, size, model.moba_block_size, model.moba_top_k, model.moba_pooling)


def received_bytes(strategy: str, shape: AttentionShape, local_tokens: int, ranks: int) -> tuple[float, float]:
    """(forward, backward) bytes that a rank receives in one layer, without activation checkpointing.

    "route_queries" is an estimate from above for one document whose blocks lie whole on the ranks: a query head that
    chose two blocks of one rank travels there once, and a block that ranks share is visited on each of them.
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
        chosen = local_tokens * shape.query_heads * (shape.top_k - 1) * share
        sent = min(chosen, local_tokens * shape.query_heads * (ranks - 1))  # a head visits a rank once
        forward = sent * (2 * row + statistic) + 4 * chosen  # queries, outputs and their lse; numbers of blocks
        return means_bytes(shape, local_tokens, ranks) + forward, sent * (2 * row + 2 * statistic)
    keys = 2 * shape.kv_heads * row * local_tokens * (ranks - 1)
    # a ring's gradients of keys travel as sums, in float32 for half precision
    back = keys * max(1, 4 // shape.element_size) if name == "ring" else keys
    return keys, keys + back


def means_bytes(shape: AttentionShape, local_tokens: int, ranks: int) -> float:
    """Bytes of the gate: what an all-gather of block means, in float32 (float64 for float64), brings to a rank.

    For one document whose blocks lie whole on the ranks; every further document or cut block adds a mean.
    """
    means = local_tokens / shape.block_size * shape.kv_heads * shape.head_dim
    return means * max(4, shape.element_size) * (ranks - 1)


def choose(kind: str, shape: AttentionShape, local_tokens: int, ranks: int) -> str:
    """The strategy of a "moba" or "full" layer: the fewest bytes received, forward and backward together, among those
    that hold no more than MOST_HELD times the memory of the leanest at once.

    So with few KV heads and many ranks a ring, which moves more, replaces an all-gather of one head of all tokens.
    """
    names = MOBA_STRATEGIES if kind == "moba" else FULL_STRATEGIES
    usable = [name for name in names if possible(name, ranks, shape.kv_heads)]
    if shape.pooling != "mean":
        usable = [name for name in usable if not name.endswith("route_queries")]
    held = {name: held_bytes(name, shape, local_tokens, ranks) for name in usable}
    usable = [name for name in usable if held[name] <= MOST_HELD * min(held.values())]
    return min(usable, key=lambda name: sum(received_bytes(name, shape, local_tokens, ranks)))


def work_imbalance(kind: str, strategy: str, split: ContextSplit, shape: AttentionShape, causal: bool) -> float:
    """Largest / mean number of (query, key) pairs of a rank, for one document that fills the batch.

    MoBA's queries are taken to choose evenly among the blocks they may choose. Under "ulysses" every rank computes all
    tokens of its heads; "route_queries" computes where the keys are, everything else where the queries are.
    """
    inner = ulysses_ranks(split.ranks, shape.kv_heads) if strategy.startswith("ulysses") else 1
    split, size, others = split.merged(inner), shape.block_size, shape.top_k - 1
    blocks = -(-split.num_tokens // size)
    # how often a key of each block is visited from later blocks, in queries
    visits = [0.0, *accumulate(size * min(others, block) / block for block in range(blocks - 1, 0, -1))][::-1]
    loads = [0.0] * split.ranks
    borders = sorted({*range(0, split.num_tokens, size), *range(0, split.num_tokens, split.unit), split.num_tokens})
    for start, stop in pairwise(borders):
        block, middle = start // size, (start + stop) / 2
        if not causal:
            pairs = 1.0
        elif kind == "full":
            pairs = middle
        elif strategy.endswith("route_queries"):
            pairs = middle - block * size + visits[block]
        else:
            pairs = middle - block * size + size * min(others, block)
        loads[split.owner(start // split.unit)] += pairs * (stop - start)
    return max(loads) / (sum(loads) / len(loads))


def held_bytes(strategy: str, shape: AttentionShape, local_tokens: int, ranks: int) -> float:
    """Bytes of a layer that a rank holds at once in its backward pass."""
    arguments = (strategy, shape, local_tokens, ranks)
    return kept_bytes(*arguments) + passing_bytes(*arguments)


def kept_bytes(strategy: str, shape: AttentionShape, local_tokens: int, ranks: int) -> float:
    """Bytes that a rank keeps of one attention layer until its backward pass: q, k, v, output and the logsumexp, and
    the queries that visit it."""
    row, statistic = shape.head_dim * shape.element_size, shape.query_heads * max(4, shape.element_size)
    kept = local_tokens * ((2 * shape.query_heads + 2 * shape.kv_heads) * row + statistic)
    if strategy.endswith("route_queries"):
        kept += local_tokens * shape.query_heads * min(shape.top_k - 1, ranks) * row
    return kept


def passing_bytes(strategy: str, shape: AttentionShape, local_tokens: int, ranks: int) -> float:
    """Bytes of a layer's backward pass that a rank holds at once beside what it kept: keys and values of other ranks
    with their gradients, once in the dtype of the keys and once summed in float32, or those of the received queries."""
    inner = ulysses_ranks(ranks, shape.kv_heads) if strategy.startswith("ulysses") else 1
    outer, row, name = ranks // inner, shape.head_dim * shape.element_size, strategy.removeprefix("ulysses+")
    tokens, query_heads, kv_heads = local_tokens * inner, shape.query_heads // inner, shape.kv_heads // inner
    own = (query_heads + 2 * kv_heads) * row * tokens if inner > 1 else 0
    with_gradients = 2 * (2 * row + shape.head_dim * max(4, shape.element_size))
    if name == "allgather_kv":
        return own + tokens * outer * -(-kv_heads // outer) * with_gradients
    if name == "ring":
        return own + 2 * tokens * kv_heads * with_gradients
    if name == "route_queries":
        return own + 3 * tokens * query_heads * min(shape.top_k - 1, outer) * row
    return own


def describe(config: Config) -> str:
    """The split of a micro-batch and, for MoBA and full layers, strategy, bytes and balance: a line each."""
    model, parallel, ranks = config.model, config.parallel, config.parallel.context_parallel_size
    shape, tokens = AttentionShape.of(config), config.micro_batch_size * config.phase.sequence_length
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    split = ContextSplit.of_tokens(tokens, ranks, parallel.context_parallel_split, model.moba_block_size, multiple)
    lines = [
        f"context parallelism: {tokens:,} tokens + {split.num_tokens - tokens} of padding, {split.local_tokens:,} on "
        f"each of {ranks} ranks ({parallel.context_parallel_split}: {split.units} x {split.unit})"
    ]
    for kind, chosen in (("moba", parallel.context_parallel_moba), ("full", parallel.context_parallel_full)):
        if kind not in model.layer_attentions and not (kind == "full" and config.phase.full_attention_fraction):
            continue
        strategy = choose(kind, shape, split.local_tokens, ranks) if chosen == "auto" else chosen
        forward, backward = (part / 2**20 for part in received_bytes(strategy, shape, split.local_tokens, ranks))
        balance = work_imbalance(kind, strategy, split, shape, model.causal)
        lines.append(
            f"  {kind} layers: {strategy}, {forward:.1f} + {backward:.1f} MiB received per rank, layer and micro-batch "
            f"(forward + backward), work of the busiest rank / mean {balance:.2f}"
        )
    return "\n".join(lines)
