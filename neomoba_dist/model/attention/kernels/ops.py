"""MoBA's parts as torch custom operators, so that compiled graphs hold them whole and host code inside costs no break.

The operators choose by device: the CPU path reads `cu_seqlens` on the host, everything else runs without reading a
value. Shapes of all results depend on the shapes of the arguments only.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.choice import MobaCall, gate_kernel, moba_kernel
from neomoba_dist.model.attention.kernels.cpu.attend import attend_cpu, attend_cpu_backward
from neomoba_dist.model.attention.kernels.cpu.select import block_means_cpu, select_blocks_cpu
from neomoba_dist.model.attention.kernels.layout import (
    GEOMETRY,
    BlockLayout,
    Geometry,
    PlacedBlocks,
    Problem,
    make_layout,
    max_blocks,
)
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from neomoba_dist.model.attention.kernels.reference import attend_chunked, attend_chunked_backward
from neomoba_dist.model.attention.kernels.select import (
    block_means_any,
    empty_block_indices,
    pooled_width,
    score_dtype,
    select_blocks_any,
)


def place_blocks(layout: BlockLayout, head_dim: int, dtype: torch.dtype, impl: str) -> PlacedBlocks:
    """See moba.place_blocks."""
    kernel = moba_kernel(MobaCall(layout.device, dtype, head_dim, layout.block_size, layout.num_queries), impl)
    if kernel == "torch":
        return PlacedBlocks(layout.table)
    from neomoba_dist.model.attention.kernels.triton.common import choose_tiles
    from neomoba_dist.model.attention.kernels.triton.layout import place_blocks_triton

    placed = place_blocks_triton(layout, choose_tiles(head_dim, dtype, layout.block_size, layout.num_queries).rows)
    if kernel in LIBRARIES:
        from neomoba_dist.model.attention.kernels.library.moba import block_borders

        assert placed.blocks is not None
        placed = placed._replace(borders=block_borders(placed.blocks))
    return placed


@torch.library.custom_op("neomoba::block_means", mutates_args=())
def block_means(
    k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str, table: Tensor | None = None
) -> Tensor:
    """See moba.block_means. table: that of PlacedBlocks."""
    placed = None if table is None else PlacedBlocks(table)
    layout = make_layout(0, k.shape[0], block_size, cu_seqlens, cu_seqlens, None, k.device, placed)
    if k.device.type == "cpu":
        return block_means_cpu(k, layout, pooling)
    if gate_kernel(k.dtype, k.device) == "triton":
        from neomoba_dist.model.attention.kernels.triton.select import block_means_triton

        return block_means_triton(k, layout, pooling)
    return block_means_any(k, layout, pooling)


@block_means.register_fake
def _(k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str, table: Tensor | None = None) -> Tensor:
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(max_blocks(k.shape[0], block_size, documents), k.shape[1], pooled_width(k.shape[2], pooling))


SELECT = "Tensor q, Tensor means, SymInt num_keys, SymInt top_k, str gate, str pooling"


@torch.library.custom_op("neomoba::select_blocks", mutates_args=(), schema=f"({SELECT}, {GEOMETRY}) -> Tensor")
def select_blocks(q: Tensor, means: Tensor, num_keys: int, top_k: int, gate: str, pooling: str, *fields: Any) -> Tensor:
    """See moba.select_blocks. fields: of `layout.Geometry`."""
    where = Geometry(*fields)
    layout = where.layout(q.shape[0], num_keys, q.device)
    options: dict[str, Any] = {"top_k": top_k, "causal": where.causal, "gate": gate, "pooling": pooling}
    if q.device.type == "cpu":
        return select_blocks_cpu(q, means, layout, **options)
    if gate_kernel(q.dtype, q.device) == "triton":
        from neomoba_dist.model.attention.kernels.triton.select import select_blocks_triton

        return select_blocks_triton(q, means, layout, **options)
    return select_blocks_any(q, means, layout, **options)


@select_blocks.register_fake
def _(q: Tensor, means: Tensor, num_keys: int, top_k: int, gate: str, pooling: str, *fields: Any) -> Tensor:
    return empty_block_indices(q, means, top_k, gate)


OPERANDS = f"Tensor q, Tensor k, Tensor v, Tensor? block_indices, {GEOMETRY}, str impl"


def _problem(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None, *fields: Any) -> Problem:
    where = Geometry(*fields)
    return Problem(q, k, v, block_indices, where.layout(q.shape[0], k.shape[0], q.device), where.causal)


def _kernel(problem: Problem, impl: str, lse_gradient: bool = False) -> str:
    """Full attention comes here on the CPU alone."""
    return "torch" if problem.block_indices is None else moba_kernel(MobaCall.of(problem, lse_gradient), impl)


@torch.library.custom_op("neomoba::attend", mutates_args=(), schema=f"({OPERANDS}) -> (Tensor, Tensor, Tensor)")
def attend(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See moba.attend and `layout.make_span_layout`; without block_indices every query attends to its whole document.

    operands: k, v, block_indices, the fields of `layout.Geometry`, impl. The third result is what the backward pass of
    the Triton and library paths can use again (triton/index.py), elsewhere empty.
    """
    *parts, impl = operands
    problem = _problem(q, *parts)
    kernel = _kernel(problem, impl)
    if kernel == "triton":
        from neomoba_dist.model.attention.kernels.triton.forward import attend_triton

        return attend_triton(problem)
    if kernel in LIBRARIES:
        from neomoba_dist.model.attention.kernels.library.moba import attend_library

        return attend_library(problem, LIBRARIES[kernel])
    out, lse = attend_cpu(problem) if q.device.type == "cpu" else attend_chunked(problem)
    return out, lse, q.new_empty(0, dtype=torch.int32)


@attend.register_fake
def _(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parts, impl = operands
    problem, length = _problem(q, *parts), 0
    if _kernel(problem, impl) != "torch":
        from neomoba_dist.model.attention.kernels.triton.forward import index_length

        length = index_length(problem)
    index = q.new_empty(length, dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=score_dtype(q.dtype)), index


@torch.library.custom_op(
    "neomoba::attend_backward",
    mutates_args=(),
    schema="(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? index, "
    f"{OPERANDS}) -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    q: Tensor,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. index: the third result of `attend`, None: made again. operands: as of `attend`."""
    *parts, impl = operands
    problem = _problem(q, *parts)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    kernel = _kernel(problem, impl, grad_lse is not None)
    if kernel == "triton":
        from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward

        return attend_triton_backward(problem, out, lse, grad_out, grad_lse, index)
    if kernel in LIBRARIES:
        from neomoba_dist.model.attention.kernels.library.moba import attend_library_backward

        return attend_library_backward(problem, out, lse, grad_out, index, LIBRARIES[kernel])
    backward = attend_cpu_backward if q.device.type == "cpu" else attend_chunked_backward
    return backward(problem, out, lse, grad_out, grad_lse)


@attend_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, block_indices, *fields, ctx.impl = inputs
    geometry = Geometry(*fields)
    ctx.block_size, ctx.causal, *borders = geometry
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, block_indices, *borders)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    out, lse, index, q, k, v, block_indices, *borders = ctx.saved_tensors
    geometry = Geometry(ctx.block_size, ctx.causal, *borders)
    gradients = attend_backward(grad_out, grad_lse, out, lse, index, q, k, v, block_indices, *geometry, ctx.impl)
    return *gradients, *[None] * (2 + len(geometry))


attend.register_autograd(_backward, setup_context=_keep_for_backward)
