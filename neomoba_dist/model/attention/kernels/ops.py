"""MoBA's parts as torch custom operators, so that compiled graphs hold them whole and host code inside costs no break.

The operators choose by device: the CPU path reads `cu_seqlens` on the host, everything else runs without reading a
value. Shapes of all results depend on the shapes of the arguments only.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
from torch import Tensor

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
from neomoba_dist.model.attention.kernels.reference import attend_chunked, attend_chunked_backward
from neomoba_dist.model.attention.kernels.select import (
    block_means_any,
    empty_block_indices,
    pooled_width,
    score_dtype,
    select_blocks_any,
)
from neomoba_dist.model.optional import is_available, log_choice

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def implementation(dtype: torch.dtype, device: torch.device, impl: str = "auto") -> str:
    """The implementation that runs on such queries: "torch" or "triton"; logged once per device.

    "auto" takes Triton on a GPU. By name, Triton also runs on the CPU, in its interpreter (TRITON_INTERPRET=1).

    Raises:
        ValueError: "triton" was asked for, and cannot run.
    """
    known = dtype in TRITON_DTYPES and is_available("triton")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and known else "torch"
        log_choice(f"MoBA attention in {dtype} on {device.type}", impl)
    elif impl == "triton" and not (known and (device.type == "cuda" or interprets_triton())):
        raise ValueError(f'impl="triton" needs triton, a GPU and half precision or float32, got {dtype} on {device}')
    return impl


def interprets_triton() -> bool:
    """Whether Triton was imported in its interpreter mode."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def place_blocks(layout: BlockLayout, head_dim: int, dtype: torch.dtype, impl: str) -> PlacedBlocks:
    """See moba.place_blocks."""
    if implementation(dtype, layout.device, impl) == "triton":
        from neomoba_dist.model.attention.kernels.triton.common import choose_tiles
        from neomoba_dist.model.attention.kernels.triton.layout import place_blocks_triton

        return place_blocks_triton(layout, choose_tiles(head_dim, dtype, layout.block_size).rows)
    return PlacedBlocks(layout.table)


@torch.library.custom_op("neomoba::block_means", mutates_args=())
def block_means(
    k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str, table: Tensor | None = None
) -> Tensor:
    """See moba.block_means. table: that of PlacedBlocks."""
    placed = None if table is None else PlacedBlocks(table)
    layout = make_layout(0, k.shape[0], block_size, cu_seqlens, cu_seqlens, None, k.device, placed)
    if k.device.type == "cpu":
        return block_means_cpu(k, layout, pooling)
    if implementation(k.dtype, k.device) == "triton":
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
    if implementation(q.dtype, q.device) == "triton":
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


@torch.library.custom_op("neomoba::attend", mutates_args=(), schema=f"({OPERANDS}) -> (Tensor, Tensor, Tensor)")
def attend(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See moba.attend and `layout.make_span_layout`; without block_indices every query attends to its whole document.

    operands: k, v, block_indices, the fields of `layout.Geometry`, impl. The third result is what the backward pass of
    the Triton path can use again (triton/index.py), elsewhere empty.
    """
    *parts, impl = operands
    problem = _problem(q, *parts)
    if problem.block_indices is not None and implementation(q.dtype, q.device, impl) == "triton":
        from neomoba_dist.model.attention.kernels.triton.forward import attend_triton

        return attend_triton(problem)
    out, lse = attend_cpu(problem) if q.device.type == "cpu" else attend_chunked(problem)
    return out, lse, q.new_empty(0, dtype=torch.int32)


@attend.register_fake
def _(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parts, impl = operands
    problem, length = _problem(q, *parts), 0
    if problem.block_indices is not None and implementation(q.dtype, q.device, impl) == "triton":
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
    if problem.block_indices is not None and implementation(q.dtype, q.device, impl) == "triton":
        from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward

        return attend_triton_backward(problem, out, lse, grad_out, grad_lse, index)
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
