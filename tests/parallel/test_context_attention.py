"""Every context-parallel strategy against one process, in float64: outputs, gradients and MoBA's routing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.config.context import FULL_STRATEGIES, MOBA_STRATEGIES, possible
from neomoba_dist.model.attention.context.allgather import select_local_blocks
from neomoba_dist.model.attention.context.dispatch import chosen_pieces, gather_means, plan_dispatch
from neomoba_dist.model.attention.context.merge import Exchanges
from neomoba_dist.model.attention.context.strategy import context_attention
from neomoba_dist.model.attention.layer import Attention
from neomoba_dist.model.attention.moba import MobaOptions, block_means, select_blocks
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.context_split import SPLITS, ContextSplit
from neomoba_dist.parallel.ledger import Ledger
from neomoba_dist.parallel.mesh import Mesh
from tests.ranks import run_ranks

BLOCK = 8
# packed documents: one that crosses ranks, empty ones, one shorter than a block, one of a single token
PACKED = (0, 0, 5, 6, 6, 101, 131, 203)
ONE = (0, 203)  # 203 is a multiple of nothing
ALIGNED = (0, 256)


def model_config(heads: tuple[int, int], causal: bool, **changes: Any) -> ModelConfig:
    settings = {
        "objective": "clm" if causal else "mlm",
        "hidden_size": 16,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 8,
        "num_hidden_layers": 1,
        "moba_block_size": BLOCK,
        "moba_top_k": 3,
        "hybrid_layer_count": 0,
    }
    return ModelConfig(**{**settings, **changes})


def tensors(tokens: int, heads: tuple[int, int], hot: bool = False) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, float64. hot: all queries are drawn to the first two blocks."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, heads[0], 8), (tokens, heads[1], 8), (tokens, heads[1], 8), (tokens, heads[0], 8)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if hot:
        q, k[: 2 * BLOCK] = q.abs(), k[: 2 * BLOCK] + 2
    return [q, k, v, grad]


def core_of(config: ModelConfig, kind: str) -> Callable[..., torch.Tensor]:
    """What a single process runs."""
    return Attention("attention", config, Initializer(Mesh.single(), 0, 0.02), kind=kind).core


def one_process(config: ModelConfig, kind: str, borders: tuple[int, ...], hot: bool = False) -> list[torch.Tensor]:
    """Output and gradients of q, k, v."""
    *inputs, grad = tensors(borders[-1], (config.num_attention_heads, config.num_key_value_heads), hot)
    leaves = [x.requires_grad_() for x in inputs]
    out = core_of(config, kind)(*leaves, PackedTokens(torch.tensor(borders, dtype=torch.int32)))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


class Case(NamedTuple):
    """One problem; settings: the mesh's context_... fields that differ from their defaults."""

    kind: str
    borders: tuple[int, ...]
    causal: bool = True
    heads: tuple[int, int] = (4, 2)
    settings: tuple[tuple[str, str], ...] = ()
    changes: tuple[tuple[str, int], ...] = ()
    hot: bool = False

    @property
    def config(self) -> ModelConfig:
        return model_config(self.heads, self.causal, **dict(self.changes))


class RankResult(NamedTuple):
    """Global indices of a rank's tokens; output, dq, dk, dv there; bytes received by operation, there and back."""

    index: torch.Tensor
    values: list[torch.Tensor]
    forward: dict[str, int]
    backward: dict[str, int]


def rank_results(ranks: int, kv_heads: int, cases: list[Case]) -> list[RankResult]:
    mesh = Mesh.build(ParallelConfig(context_parallel_size=ranks), num_key_value_heads=kv_heads)
    return [rank_result(case, replace(mesh, ledger=Ledger(), **dict(case.settings))) for case in cases]


def rank_result(case: Case, mesh: Mesh) -> RankResult:
    config, cp, tokens = case.config, mesh["cp"], case.borders[-1]
    split = ContextSplit.of_tokens(tokens, cp.size, mesh.context_split, config.moba_block_size)
    index = split.global_index(cp.index)
    *inputs, grad = (
        torch.cat((x, x.new_full((split.num_tokens - tokens, *x.shape[1:]), 7.0)))[index]
        for x in tensors(tokens, case.heads, case.hot)
    )
    leaves = [x.requires_grad_() for x in inputs]
    cu = torch.tensor([*case.borders, split.num_tokens], dtype=torch.int32)
    core = core_of(config, case.kind)
    packed = PackedTokens.of(torch.arange(split.local_tokens), cu, config, mesh, torch.float64)
    out = context_attention(*leaves, packed, kind=case.kind, config=config, mesh=mesh, core=core)
    forward = received(mesh)
    grads = torch.autograd.grad(out, leaves, grad * (index < tokens)[:, None, None])
    total = received(mesh)
    backward = {name: total[name] - forward.get(name, 0) for name in total}
    return RankResult(index, [out.detach(), *grads], forward, backward)


def received(mesh: Mesh) -> dict[str, int]:
    """Bytes by operation so far."""
    return {f"{axis} {name}": entry.bytes for (axis, name), entry in mesh.ledger.entries.items()}


def check(ranks: int, cases: list[Case]) -> None:
    """All cases in one world, against one process."""
    assert cases
    results = run_ranks(ranks, rank_results, ranks, cases[0].heads[1], cases, timeout=300)
    for number, case in enumerate(cases):
        expected = one_process(case.config, case.kind, case.borders, case.hot)
        for place, name in enumerate(("output", "dq", "dk", "dv")):
            actual = torch.full_like(expected[place], torch.nan)
            for result in (rank[number] for rank in results):
                inside = result.index < case.borders[-1]
                actual[result.index[inside]] = result.values[place][inside]
            error = float((actual - expected[place]).abs().max())
            assert error <= 1e-12, f"{case}: {name} differs by {error:.1e}"


def strategies(ranks: int, heads: tuple[int, int], borders: tuple[int, ...], causal: bool, **more: str) -> list[Case]:
    """All strategies that the heads allow."""
    return [
        Case(kind, borders, causal, heads, (*more.items(), (f"context_{kind}", name)))
        for kind, names in (("moba", MOBA_STRATEGIES), ("full", FULL_STRATEGIES))
        for name in names
        if possible(name, ranks, heads[1])
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("ranks", "heads", "names"),
    [
        (2, (4, 2), {"ulysses", "allgather_kv", "route_queries", "ring"}),
        (4, (4, 2), {"allgather_kv", "route_queries", "ring", "ulysses+allgather_kv", "ulysses+route_queries",
                     "ulysses+ring"}),
    ],
)  # fmt: skip
def test_every_strategy(ranks: int, heads: tuple[int, int], names: set[str], causal: bool) -> None:
    cases = [case for borders in (PACKED, ONE) for case in strategies(ranks, heads, borders, causal)]
    assert {case.settings[-1][1] for case in cases} == names
    check(ranks, cases)


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_every_split(split: str) -> None:
    assert {"block_cyclic", split} < set(SPLITS)
    check(4, strategies(4, (4, 2), PACKED, causal=split == "zigzag", context_split=split))


def test_eight_ranks() -> None:
    check(8, strategies(8, (4, 2), PACKED, causal=True))


@pytest.mark.full
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 4)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_grid(ranks: int, heads: tuple[int, int], split: str, causal: bool) -> None:
    check(ranks, [c for b in (PACKED, ONE, ALIGNED) for c in strategies(ranks, heads, b, causal, context_split=split)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sliding_window(ranks: int, causal: bool) -> None:
    """Two ranks divide the heads; four pass on a halo, here also wider than a unit of tokens."""
    check(
        ranks,
        [
            Case("sliding_window", borders, causal, changes=(("sliding_window", window),))
            for borders in (PACKED, ONE)
            for window in (5, 40)
        ],
    )


@pytest.mark.parametrize("changes", [(("moba_top_k", 1),), (("moba_top_k", 99),), (("moba_block_size", 3),)])
def test_few_and_all_blocks(changes: tuple[tuple[str, int], ...]) -> None:
    """Current block alone, every block, and blocks much smaller than the units."""
    cases = [case for causal in (True, False) for case in strategies(4, (4, 2), PACKED, causal) if case.kind == "moba"]
    check(4, [case._replace(changes=changes) for case in cases])


def hot_rank() -> tuple[int, int]:
    """Number of rounds, and the queries that this rank receives in the fullest one."""
    mesh = Mesh.build(ParallelConfig(context_parallel_size=4))
    split = ContextSplit.of_tokens(ALIGNED[-1], 4, "block_cyclic", BLOCK)
    q, k, *_ = (x[split.global_index(mesh["cp"].index)] for x in tensors(ALIGNED[-1], (4, 2), hot=True))
    exchanges = Exchanges(torch.tensor(ALIGNED, dtype=torch.int32), mesh, causal=True)
    exchange = exchanges.of(split, "cp", MobaOptions(BLOCK, 3))
    everything = exchange.pieces
    block_indices = select_local_blocks(q, gather_means(k, everything, exchange), exchange)
    rounds = plan_dispatch(chosen_pieces(block_indices, everything, exchange), everything, 2, exchange)
    return len(rounds), max(len(dispatch.block_indices) for dispatch in rounds)


def test_blocks_that_everybody_chooses() -> None:
    """Their owner receives the queries in several rounds, so that it never holds those of all tokens."""
    check(4, [Case("moba", ALIGNED, causal, settings=(("context_moba", "route_queries"),), hot=True)
              for causal in (True, False)])  # fmt: skip
    tokens, heads, others = ALIGNED[-1] // 4, 4, 2
    results = run_ranks(4, hot_rank)
    assert {rounds for rounds, _ in results} == {2}
    assert max(received for _, received in results) <= 1.5 * tokens * heads * others


def routes_of_rank(causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Global indices and block_indices of a rank's queries, from the gathered means of everybody's pieces."""
    mesh = Mesh.build(ParallelConfig(context_parallel_size=4))
    split = ContextSplit.of_tokens(PACKED[-1], 4, "block_cyclic", BLOCK)
    index, padding = split.global_index(mesh["cp"].index), split.num_tokens - PACKED[-1]
    q, k, *_ = (torch.cat((x, x.new_ones(padding, *x.shape[1:])))[index] for x in tensors(PACKED[-1], (4, 2)))
    cu = torch.tensor([*PACKED, split.num_tokens], dtype=torch.int32)
    exchange = Exchanges(cu, mesh, causal).of(split, "cp", MobaOptions(BLOCK, 3))
    return index, select_local_blocks(q, gather_means(k, exchange.pieces, exchange), exchange)


@pytest.mark.parametrize("causal", [True, False])
def test_routing_is_identical(causal: bool) -> None:
    q, k, *_ = tensors(PACKED[-1], (4, 2))
    cu = torch.tensor(PACKED, dtype=torch.int32)
    means = block_means(k, block_size=BLOCK, cu_seqlens=cu)
    expected = select_blocks(q, means, block_size=BLOCK, top_k=3, causal=causal, cu_seqlens=cu)
    assert (expected[:, :, 1:] >= 0).float().mean() > 0.5
    seen = 0
    for index, block_indices in run_ranks(4, routes_of_rank, causal):
        inside = index < PACKED[-1]
        assert block_indices[inside].equal(expected[index[inside]])
        seen += int(inside.sum())
    assert seen == PACKED[-1]


def test_moba_is_not_full_attention_here() -> None:
    for causal in (True, False):
        config = model_config((4, 2), causal, sliding_window=5)
        outputs = [one_process(config, kind, PACKED)[0] for kind in ("moba", "full", "sliding_window")]
        assert all((a - b).abs().max() > 1e-2 for a, b in combinations(outputs, 2))
