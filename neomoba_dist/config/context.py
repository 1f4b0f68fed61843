"""The names of context parallelism's exchange strategies, and which of them the KV heads allow."""

import math
from typing import Final

MOBA_STRATEGIES: Final = ("ulysses", "allgather_kv", "route_queries", "ulysses+allgather_kv", "ulysses+route_queries")
FULL_STRATEGIES: Final = ("ulysses", "allgather_kv", "ring", "ulysses+allgather_kv", "ulysses+ring")


def ulysses_ranks(ranks: int, kv_heads: int) -> int:
    """The largest part of `ranks` over which KV heads can be split: what "ulysses+..." gives to Ulysses."""
    return math.gcd(ranks, kv_heads)


def possible(strategy: str, ranks: int, kv_heads: int) -> bool:
    """Whether the KV heads of one tensor-parallel rank allow the strategy on `ranks` context-parallel ranks.

    "ulysses" needs as many ranks as divide them; "ulysses+..." is for more ranks than that.
    """
    inner = ulysses_ranks(ranks, kv_heads)
    if strategy == "ulysses":
        return inner == ranks
    return 1 < inner < ranks if strategy.startswith("ulysses+") else True
