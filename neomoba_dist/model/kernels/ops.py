"""MoBA's parts as torch custom operators, so that compiled graphs hold them whole and host code inside costs no break.

The operators choose by device: the CPU path reads `cu_seqlens` on the host, everything else runs without reading a
value. Shapes of all results depend on the shapes of the arguments only.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.model.kernels import gathered, is_available
from neomoba_dist.model.kernels.gather_tasks import Problem
from neomoba_dist.model.kernels.layout import make_layout, max_blocks
from neomoba_dist.model.kernels.routing import block_means_any, empty_routes, pooled_width, route_any, score_dtype
from neomoba_dist.model.kernels.routing_cpu import block_means_cpu, route_cpu

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_on_triton(q: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: a GPU, a dtype they know, and triton importable."""
    return q.device.type == "cuda" and q.dtype in TRITON_DTYPES and is_available("triton")


@torch.library.custom_op("neomoba::block_means", mutates_args=())
def block_means(k: Tensor, block_size: int, cu_seqlens: Tensor | None, pooling: str) -> Tensor:
    """See moba.block_means."""
    layout = make_layout(0, k.shape[0], block_size, cu_seqlens, cu_seqlens, None, k.device)
    return (block_means_cpu if k.device.type == "cpu" else block_means_any)(k, layout, pooling)


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
    chosen = route_cpu if q.device.type == "cpu" else route_any
    return chosen(q, means, layout, top_k=top_k, causal=causal, gate=gate, pooling=pooling)


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
) -> tuple[Tensor, Tensor]:
    """See moba.attend; without routes every query attends to its whole document."""
    layout = make_layout(q.shape[0], k.shape[0], block_size, cu_seqlens, cu_seqlens_k, q_offset, q.device)
    return gathered.attend_cpu(Problem(q, k, v, routes, layout, causal))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    layout = make_layout(q.shape[0], k.shape[0], block_size, cu_seqlens, cu_seqlens_k, q_offset, q.device)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return gathered.attend_cpu_backward(Problem(q, k, v, routes, layout, causal), out, lse, grad_out, grad_lse)


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
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, routes, ctx.block_size, ctx.causal, cu_seqlens, cu_seqlens_k, q_offset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, routes, *output, cu_seqlens, cu_seqlens_k, q_offset)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, routes, out, lse, *places = ctx.saved_tensors
    grads = attend_backward(grad_out, grad_lse, q, k, v, routes, out, lse, ctx.block_size, ctx.causal, *places)
    return *grads, None, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_keep_for_backward)
