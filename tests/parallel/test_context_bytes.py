"""What the exchange strategies receive, by the ledger, against the formulas that choose among them."""

from dataclasses import replace

import pytest
import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.config.context import FULL_STRATEGIES, MOBA_STRATEGIES, possible, ulysses_ranks
from neomoba_dist.model.attention.context.strategy import context_attention
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.parallel.context_cost import AttentionShape, choose, received_bytes, work_imbalance
from neomoba_dist.parallel.context_split import SPLITS, ContextSplit
from neomoba_dist.parallel.ledger import Ledger
from neomoba_dist.parallel.mesh import Mesh
from tests.parallel.test_context_attention import core_of
from tests.ranks import run_ranks

RANKS, TOKENS = 4, 4096
PROBLEM = AttentionShape(query_heads=4, kv_heads=2, head_dim=64, element_size=4, block_size=256, top_k=3)
NAMES = [
    (kind, name)
    for kind, names in (("moba", MOBA_STRATEGIES), ("full", FULL_STRATEGIES))
    for name in names
    if possible(name, RANKS, PROBLEM.kv_heads)
]


def _received() -> list[tuple[int, int, int]]:
    """For every strategy the bytes received forward, backward, and by the forward's all-gathers."""
    shape = PROBLEM
    mesh = Mesh.build(ParallelConfig(context_parallel_size=RANKS), num_key_value_heads=shape.kv_heads)
    config = ModelConfig(
        objective="clm",
        num_hidden_layers=1,
        hybrid_layer_count=0,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        moba_block_size=shape.block_size,
        moba_top_k=shape.top_k,
    )
    split = ContextSplit.of_tokens(TOKENS, RANKS, "block_cyclic", shape.block_size)
    generator = torch.Generator().manual_seed(mesh["cp"].index)
    heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(split.local_tokens, n, shape.head_dim, generator=generator).requires_grad_() for n in heads)
    cu, found = torch.tensor([0, TOKENS, TOKENS], dtype=torch.int32), []
    for kind, name in NAMES:
        here = replace(mesh, ledger=Ledger(), **{f"context_{kind}": name})
        out = context_attention(
            q, k, v, PackedTokens(cu), kind=kind, config=config, mesh=here, core=core_of(config, kind)
        )
        entries = here.ledger.entries
        forward = sum(entry.bytes for entry in entries.values())
        gathered = sum(entry.bytes for (_, operation), entry in entries.items() if operation == "all_gather")
        out.sum().backward()
        found.append((forward, sum(entry.bytes for entry in entries.values()) - forward, gathered))
    return found


def test_bytes_are_those_of_the_formulas() -> None:
    shape, local = PROBLEM, TOKENS // RANKS
    ranks = run_ranks(RANKS, _received, timeout=300)
    share, row = (RANKS - 1) / RANKS, shape.head_dim * shape.element_size
    keys = 2 * shape.kv_heads * row * local * (RANKS - 1)
    for number, (kind, name) in enumerate(NAMES):
        predicted = received_bytes(name, shape, local, RANKS)
        for direction in (0, 1):
            worst = max(rank[number][direction] for rank in ranks)
            assert worst <= 1.05 * predicted[direction], (kind, name, direction)
            if "route_queries" not in name:  # there, the formula is an upper bound
                assert worst == predicted[direction], (kind, name, direction)
        if name == "route_queries":
            # the published formula has no room for the numbers of the pieces: 4 bytes in 516
            published = local * shape.query_heads * (shape.top_k - 1) * share * (2 * row + 4)
            assert max(rank[number][0] for rank in ranks) <= 1.05 * published
            assert 0 < max(rank[number][2] for rank in ranks) <= keys / 256  # the gate


def test_work_is_counted_by_pieces() -> None:
    """Units that are no multiple of the block: half a block each, and a little more than one."""
    shape = AttentionShape(8, 1, 64, 2, 512, 3)
    for tokens, ranks in ((4096, 8), (32768, 64), (32768, 6)):
        split = ContextSplit.of_tokens(tokens, ranks, "block_cyclic", 512)
        assert work_imbalance("full", "ring", split, shape, causal=True) == pytest.approx(1.0, abs=1e-9)


def test_the_cheapest_strategy_is_chosen() -> None:
    """The table of moba.md, section 7: heads 32/8 x 128 in bfloat16, and 12/12 x 64."""
    shape = AttentionShape(32, 8, 128, 2, 512, 3)
    assert choose("moba", shape, 32768 // 8, 8) == choose("full", shape, 32768 // 8, 8) == "ulysses"
    assert choose("moba", shape, 131072 // 64, 64) == "route_queries"
    assert choose("full", shape, 131072 // 64, 64) == "ulysses+allgather_kv"
    mib = [received_bytes(name, shape, 4096, 8)[0] / 2**20 for name in ("allgather_kv", "ulysses", "route_queries")]
    assert [round(size) for size in mib] == [112, 70, 114]


def test_memory_and_pooling_rule_out_strategies() -> None:
    """One KV head on 64 ranks: an all-gather would hold it for all tokens; only means are put together from parts."""
    shape = AttentionShape(16, 1, 128, 2, 512, 3)
    assert choose("full", shape, 131072 // 8, 8) == "allgather_kv"
    assert choose("full", shape, 131072 // 64, 64) == "ring"
    assert sum(received_bytes("ring", shape, 2048, 64)) > sum(received_bytes("allgather_kv", shape, 2048, 64))
    assert choose("moba", shape, 131072 // 64, 64) == "route_queries"
    assert choose("moba", replace(shape, pooling="max"), 131072 // 64, 64) == "allgather_kv"


@pytest.mark.parametrize(("ranks", "heads", "inner"), [(8, 8, 8), (8, 4, 4), (64, 8, 8), (6, 4, 2), (4, 1, 1)])
def test_ulysses_takes_the_ranks_that_kv_heads_suffice_for(ranks: int, heads: int, inner: int) -> None:
    assert ulysses_ranks(ranks, heads) == inner
    assert possible("ulysses", ranks, heads) == (inner == ranks)
    assert possible("ulysses+ring", ranks, heads) == (1 < inner < ranks)


def test_work_is_balanced_by_the_default_split() -> None:
    """At 32k tokens on 8 ranks: the largest share of (query, key) pairs over the mean."""
    shape, worst = AttentionShape(32, 8, 128, 2, 512, 3), {}
    for name in SPLITS:
        split = ContextSplit.of_tokens(32768, 8, name, 512)
        layers = [("full", "ring"), ("full", "allgather_kv"), ("moba", "allgather_kv"), ("moba", "route_queries")]
        worst[name] = [work_imbalance(*layer, split, shape, causal=True) for layer in layers]
        assert work_imbalance("moba", "route_queries", split, shape, causal=False) == 1.0
    assert max(worst["block_cyclic"]) <= 1.12
    assert worst["contiguous"][0] > 1.8  # the last rank's queries see everything
    assert worst["zigzag"][3] > 1.5  # everybody visits the first blocks
