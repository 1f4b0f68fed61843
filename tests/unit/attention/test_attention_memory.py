"""What MoBA holds at once on a GPU, counted byte by byte on tensors without storage, against FlashAttention.

Launches and the libraries' calls are not made: a library in their place makes the tensors that FlashAttention makes.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from neomoba_dist.model.attention.kernels.groups import head_groups
from neomoba_dist.model.attention.kernels.layout import Problem, make_layout
from neomoba_dist.model.attention.kernels.library.moba import (
    PADDED_ROWS,
    attend_library,
    attend_library_backward,
    backward_bytes,
    forward_bytes,
)
from neomoba_dist.model.attention.kernels.library.varlen import Varlen
from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward
from neomoba_dist.model.attention.kernels.triton.common import Tiles, tiles_of
from neomoba_dist.model.attention.kernels.triton.forward import attend_triton, index_length
from neomoba_dist.model.attention.kernels.triton.layout import own_tiles

Shape = tuple[int, int, int, int, int, int]  # tokens, query heads, KV heads, head_dim, block size, top-k
REFERENCE = (32768, 16, 16, 128, 512, 3)
SHAPES: list[Shape] = [
    REFERENCE,
    (131072, 16, 16, 128, 512, 3),
    (32768, 12, 4, 64, 512, 3),  # phase 3
    (32768, 16, 16, 128, 128, 8),  # FlashMoBA's
    (4096, 4, 2, 64, 512, 3),
]
GOAL = 1.2


class Held(TorchDispatchMode):
    """Bytes of the storages that operators make, each until its last tensor goes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for result in tree_leaves(results):
            storage = result.untyped_storage() if isinstance(result, Tensor) else None
            if storage is None or storage._cdata in given | self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return results

    def forget(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.now -= size


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *sequences: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *sequences: Any) -> Any:
    """Float32 sums of dq with up to PADDED_ROWS more rows per sequence, as in flash-attn 2 and 4."""
    assert lse.shape == (q.shape[1], len(q))
    gradients = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    rows = len(q) + PADDED_ROWS * (len(sequences[0]) - 1)
    sums = q.new_empty(rows, *q.shape[1:], dtype=torch.float32)
    assert len(sums)
    return gradients


ATOMICS = Tiles(32, 128, 8, 3, atomics=True)
FLASH = Varlen(_flash_forward, _flash_backward)


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)


def problem_of(shape: Shape) -> tuple[Problem, Tensor]:
    """Also the gradient of the output. All on the "meta" device: shapes without memory."""
    tokens, heads, kv_heads, dim, block_size, top_k = shape
    q, k, v, grad = (
        torch.empty(tokens, count, dim, dtype=torch.bfloat16, device="meta")
        for count in (heads, kv_heads, kv_heads, heads)
    )
    block_indices = torch.empty(tokens, heads, top_k, dtype=torch.int32, device="meta")
    layout = make_layout(tokens, tokens, block_size, None, None, None, q.device)
    return Problem(q, k, v, block_indices, layout, True), grad


def moba_bytes(shape: Shape, path: str) -> tuple[int, int]:
    """Most bytes beside the inputs in the forward pass, and in the backward pass with what the former keeps.

    path: "triton", "atomics" (Triton with these for dq) or "library".
    """
    problem, grad = problem_of(shape)
    selected = problem.block_indices
    assert selected is not None
    with Held() as held:
        held.now = held.most = selected.nbytes
        out, lse, index = attend_library(problem, FLASH) if path == "library" else attend_triton(problem)
        forward, kept = held.most, held.now
        assert kept == selected.nbytes + out.nbytes + lse.nbytes + index.nbytes
        held.most = 0
        if path == "library":
            gradients = attend_library_backward(problem, out, lse, grad, index, FLASH)
        else:
            key_tiles = ATOMICS if path == "atomics" else None
            gradients = attend_triton_backward(problem, out, lse, grad, None, index, key_tiles=key_tiles)
        assert held.now == kept + sum(x.nbytes for x in gradients)
        return forward, held.most


def flash_bytes(shape: Shape) -> int:
    problem, grad = problem_of(shape)
    borders = torch.empty(2, dtype=torch.int32, device="meta")
    with Held() as held:
        out, lse = FLASH.forward(problem.q, problem.k, problem.v, borders)
        gradients = FLASH.backward(grad, problem.q, problem.k, problem.v, out, lse, borders)
        assert held.now == out.nbytes + lse.nbytes + sum(x.nbytes for x in gradients)
        return held.most


def kept_bytes(problem: Problem) -> int:
    """The output, the logsumexp, the index and the selection."""
    assert problem.block_indices is not None
    statistics = 4 * problem.q.shape[0] * problem.q.shape[1]
    return problem.q.nbytes + statistics + 4 * index_length(problem) + problem.block_indices.nbytes


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_holds_what_the_formula_says(shape: Shape) -> None:
    """docs/kernels.md, "Memory"."""
    problem, _ = problem_of(shape)
    (tokens, heads, _, dim, _, top_k), q = shape, problem.q
    own = own_tiles(problem.layout, tiles_of(problem).rows)
    places = 20 * (problem.layout.num_blocks + own[2])  # CurrentBlocks
    out, dq = (tokens * (top_k - 1) * (2 * dim + extra) for extra in (4, 0))  # the parts of one head
    forward = kept_bytes(problem) + heads // head_groups(q, heads, out) * out + places
    backward = kept_bytes(problem) + q.nbytes + 2 * problem.k.nbytes + 4 * tokens * heads + places
    assert moba_bytes(shape, "triton") == (forward, backward + heads // head_groups(q, heads, dq) * dq)
    assert moba_bytes(shape, "atomics") == (forward, backward + 4 * q.numel())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_library_holds_what_the_formula_says(shape: Shape) -> None:
    problem, _ = problem_of(shape)
    (tokens, heads, kv_heads, dim, *_), blocks = shape, problem.layout.num_blocks
    found = []
    for one in (forward_bytes(problem), backward_bytes(problem)):
        groups = head_groups(problem.q, kv_heads, one)
        together = kv_heads // groups
        sequences = together * blocks + 1
        rows_of_groups = groups * -(-sequences // 4) * 4
        borders = 4 * (blocks + 1 + heads * blocks + rows_of_groups + sequences)
        views = 2 * 2 * dim * tokens * (together == 1)  # keys and values of one head are not copied
        found.append(kept_bytes(problem) + together * one - views + borders)
    gradients = problem.q.nbytes + 2 * problem.k.nbytes + 4 * tokens * heads  # and the current blocks' logsumexp
    assert moba_bytes(shape, "library") == (found[0], found[1] + gradients)


@pytest.mark.parametrize("tokens", [32768, 131072])
@pytest.mark.parametrize("path", ["triton", "atomics", "library"])
def test_moba_holds_little_more_than_flash_attention(path: str, tokens: int) -> None:
    shape = (tokens, *REFERENCE[1:])
    assert flash_bytes(shape) < max(moba_bytes(shape, path)) <= GOAL * flash_bytes(shape)


@pytest.mark.parametrize(
    "shape", [(32768, 12, 4, 64, 512, 3), (131072, 16, 16, 128, 128, 8), (131072, 8, 8, 128, 512, 16)]
)
def test_triton_does_so_at_other_shapes(shape: Shape) -> None:
    assert max(moba_bytes(shape, "triton")) <= GOAL * flash_bytes(shape)
