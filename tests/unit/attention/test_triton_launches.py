"""What the Triton path asks of the host: few operators per call, and no new variant of a kernel for a new length.

Launches are counted and not made, so that the count is that of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from neomoba_dist.model.attention.kernels.layout import BlockLayout, Problem, make_layout
from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward
from neomoba_dist.model.attention.kernels.triton.common import Tiles, choose_tiles
from neomoba_dist.model.attention.kernels.triton.forward import attend_triton, index_length
from neomoba_dist.model.attention.kernels.triton.layout import place_blocks_triton
from neomoba_dist.model.attention.kernels.triton.select import block_means_triton, select_blocks_triton
from tests.triton_runs import Operators

Variant = tuple[str, ...]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The compiled variant of each launch, by Triton's rules: dtypes, constants, and integers that are specialised."""
    made: list[Variant] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        variant = [self.fn.__name__, str(sorted(options.items()))]
        for parameter, value in zip(self.params, args, strict=True):
            if isinstance(value, Tensor):
                variant.append(str(value.dtype))
            elif isinstance(value, int) and not parameter.is_constexpr:
                variant.append("any" if parameter.do_not_specialize else f"{value == 1} {value % 16 == 0}")
            else:
                variant.append(str(value))
        made.append(tuple(variant))

    monkeypatch.setattr(JITFunction, "run", record)
    return made


def steps(
    tokens: int, cu_seqlens: Tensor | None, known: bool = False, key_tiles: Tiles | None = None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The Triton path of one call of moba_attention: forward and backward. known: with what the first layer found."""
    q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
    k = q[:, :2]
    whole = make_layout(tokens, tokens, 512, cu_seqlens, None, None, q.device)
    placed = place_blocks_triton(whole, choose_tiles(64, q.dtype, 512, tokens).rows) if known else None

    def layout(queries: int) -> BlockLayout:
        return make_layout(queries, tokens, 512, cu_seqlens, None, None, q.device, placed)

    def forward() -> tuple[Tensor, ...]:
        means = block_means_triton(k, layout(0), "mean")
        options = {"top_k": 3, "causal": True, "gate": "per_head", "pooling": "mean"}
        block_indices = select_blocks_triton(q, means, layout(tokens), **options)
        return block_indices, *attend_triton(Problem(q, k, k, block_indices, layout(tokens), True))

    def backward() -> None:
        block_indices = torch.empty(tokens, 4, 3, dtype=torch.int32)
        lse, problem = torch.empty(tokens, 4), Problem(q, k, k, block_indices, layout(tokens), True)
        index = torch.empty(index_length(problem), dtype=torch.int32) if known else None
        attend_triton_backward(problem, q, lse, q, None, index, key_tiles=key_tiles)

    return forward, backward


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("borders", [None, [0, 700, 2048]])
def test_a_call_takes_few_operators(launches: list[Variant], borders: list[int] | None, known: bool) -> None:
    """known: in all layers of a model, which are told what was found for the micro-batch; else a call by itself."""
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    for step, expected in zip(steps(2048, cu_seqlens, known), (6, 4) if known else (10, 8), strict=True):
        launches.clear()
        with Operators() as operators:
            step()
        assert launches
        assert operators.count + len(launches) == expected


@pytest.mark.parametrize("deterministic", [False, True])
def test_dq_by_atomics_takes_no_launch_of_its_own(launches: list[Variant], deterministic: bool) -> None:
    """Zeros, one launch for all gradients, and the scale, however many groups of heads; else those of dq."""
    _, backward = steps(16384, None, True, Tiles(32, 128, 8, 3, atomics=True))
    launches.clear()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Operators() as operators:
            backward()
    finally:
        torch.use_deterministic_algorithms(False)
    of_dq = ["selected_query_gradient_kernel", "current_query_gradient_kernel"] if deterministic else []
    assert [name for name, *_ in launches] == ["delta_kernel", "long_list_kernel", "key_gradient_kernel", *of_dq]
    assert operators.count == (0 if deterministic else 2)


def test_lengths_do_not_make_variants(launches: list[Variant]) -> None:
    variants = []
    for tokens, borders in ((2048, [0, 2048]), (1999, [0, 5, 1999]), (4097, [0, 1, 2, 4097])):
        launches.clear()
        for step in steps(tokens, torch.tensor(borders, dtype=torch.int32)):
            step()
        variants.append(set(launches))
    assert variants[0] == variants[1] == variants[2]
