"""MoBA's parts as torch custom operators, so that compiled graphs hold them whole and host code inside costs no break.

The operators choose by device: the CPU path reads `cu_seqlens` on the host, everything else runs without reading a
value. Shapes of all results depend on the shapes of the arguments only.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.chunked import attend_chunked, attend_chunked_backward
from neomoba_dist.model.attention.kernels.cpu import attend as gathered
from neomoba_dist.model.attention.kernels.cpu.select import block_means_cpu, route_cpu
from neomoba_dist.model.attention.kernels.cpu.tasks import Problem
from neomoba_dist.model.attention.kernels.layout import BlockLayout, make_layout, make_span_layout, max_blocks
from neomoba_dist.model.attention.kernels.select import (
    block_means_any,
    empty_routes,
    pooled_width,
    route_any,
    score_dtype,
)
from neomoba_dist.model.optional import is_available, log_choice

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def implementation(q: Tensor, impl: str = "auto") -> str:
    """The implementation that runs on q: "torch" or "triton"; logged once per device.

    "auto" takes Triton on a GPU. By name, Triton also runs on the CPU, in its interpreter (TRITON_INTERPRET=1).

    Raises:
        ValueError: "triton" was asked for, and cannot run.
    """
    known = q.dtype in TRITON_DTYPES and is_available("triton")
    if impl == "auto":
        impl = "triton" if q.device.type == "cuda" and known else "torch"
        log_choice(f"MoBA attention in {q.dtype} on {q.device.type}", impl)
    elif impl == "triton" and not (known and (q.device.type == "cuda" or interprets_triton())):
        raise ValueError(
            f'impl="triton" needs triton, a GPU and half precision or float32, got {q.dtype} on {q.device}'
        )
    return impl


def interprets_triton() -> bool:
    """Whether Triton was imported in its interpreter mode."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.library.custom_op("neomoba::block_means", mutates_args=())
def block_means(k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str) -> Tensor:
    """See moba.block_means."""
    layout = make_layout(0, k.shape[0], block_size, cu_seqlens, cu_seqlens, None, k.device)
    if k.device.type == "cpu":
        return block_means_cpu(k, layout, pooling)
    if implementation(k) == "triton":
        from neomoba_dist.model.attention.kernels.triton.select import block_means_triton

        return block_means_triton(k, layout, pooling)
    return block_means_any(k, layout, pooling)


@block_means.register_fake
def _(k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str) -> Tensor:
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(max_blocks(k.shape[0], block_size, documents), k.shape[1], pooled_width(k.shape[2], pooling))


@torch.library.custom_op("neomoba::route", mutates_args=())
def route(
    q: Tensor,
    means: Tensor,
    num_keys: int,
    block_size: int,
    top_k: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    gate: str,
    pooling: str,
) -> Tensor:
    """See moba.route."""
    layout = make_layout(q.shape[0], num_keys, block_size, cu_seqlens, cu_seqlens_k, q_offset, q.device)
    options: dict[str, Any] = {"top_k": top_k, "causal": causal, "gate": gate, "pooling": pooling}
    if q.device.type == "cpu":
        return route_cpu(q, means, layout, **options)
    if implementation(q) == "triton":
        from neomoba_dist.model.attention.kernels.triton.select import route_triton

        return route_triton(q, means, layout, **options)
    return route_any(q, means, layout, **options)


@route.register_fake
def _(
    q: Tensor,
    means: Tensor,
    num_keys: int,
    block_size: int,
    top_k: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    gate: str,
    pooling: str,
) -> Tensor:
    return empty_routes(q, means, top_k, gate)


def _layout(
    q: Tensor,
    k: Tensor,
    block_size: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    spans: Tensor | None,
) -> BlockLayout:
    if spans is not None:
        return make_span_layout(q.shape[0], block_size, spans)
    return make_layout(q.shape[0], k.shape[0], block_size, cu_seqlens, cu_seqlens_k, q_offset, q.device)


@torch.library.custom_op("neomoba::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None,
    block_size: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    spans: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """See moba.attend and moba.attend_spans; without routes every query attends to its whole document."""
    layout = _layout(q, k, block_size, cu_seqlens, cu_seqlens_k, q_offset, spans)
    if routes is not None and implementation(q, impl) == "triton":
        from neomoba_dist.model.attention.kernels.triton.forward import attend_triton

        return attend_triton(q, k, v, routes, layout, causal)
    problem = Problem(q, k, v, routes, layout, causal)
    return gathered.attend_cpu(problem) if q.device.type == "cpu" else attend_chunked(problem)


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None,
    block_size: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    spans: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=score_dtype(q.dtype))


@torch.library.custom_op("neomoba::attend_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    spans: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    layout = _layout(q, k, block_size, cu_seqlens, cu_seqlens_k, q_offset, spans)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if routes is not None and implementation(q, impl) == "triton":
        from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward

        return attend_triton_backward(q, k, v, routes, out, lse, grad_out, grad_lse, layout, causal)
    problem = Problem(q, k, v, routes, layout, causal)
    if q.device.type == "cpu":
        return gathered.attend_cpu_backward(problem, out, lse, grad_out, grad_lse)
    return attend_chunked_backward(problem, grad_out, grad_lse)


@attend_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    spans: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, routes, ctx.block_size, ctx.causal, cu_seqlens, cu_seqlens_k, q_offset, spans, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, routes, *output, cu_seqlens, cu_seqlens_k, q_offset, spans)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, routes, out, lse, *places = ctx.saved_tensors
    tensors = (grad_out, grad_lse, q, k, v, routes, out, lse)
    return *attend_backward(*tensors, ctx.block_size, ctx.causal, *places, ctx.impl), *[None] * 8


attend.register_autograd(_backward, setup_context=_keep_for_backward)
