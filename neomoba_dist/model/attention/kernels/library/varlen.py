"""Attention over packed sequences by a library: each a pair of functions, forward and backward, behind one operator.

What the functions take and return is the same for all. Sequence i consists of the queries cu_q[i] to cu_q[i + 1] and
the keys cu_k[i] to cu_k[i + 1]; either may be empty. The backward pass takes any `out` and `lse`, also those of more
keys than it is shown: its gradients are then these keys' share (FlashAttention-2, arXiv 2307.08691, section 3.2.2).

    forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) -> out, lse
    backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale) -> dq, dk, dv

Legend: T queries, S keys, Hq/Hkv query and KV heads, D head_dim. q, out, grad_out [T, Hq, D]; k, v [S, Hkv, D]; lse
natural, float32 [Hq, T]; cu_q, cu_k int32 [sequences + 1]; max_q, max_k: no sequence is longer.

Not one line of the libraries is ours, and no GPU has run these calls: tests hold them against the signatures that they
cite (tests/unit/attention/test_library.py), tests/gpu/test_library_gpu.py against float64.
"""

# No "from __future__ import annotations" here: torch reads the operators' schemas off the annotations.
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Varlen(NamedTuple):
    """A library's two functions, see above."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def flash_attn_4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py: flash_attn_varlen_func, which returns (out, lse)."""
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )


def flash_attn_4_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same file: _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale, causal, ..., deterministic, dq, dk, dv).

    The gradients are handed in as zeros: whether keys without queries get any was a bug of some versions
    (flash-attention #1537, #2568).
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad_out,
        lse,
        softmax_scale=scale,
        causal=causal,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_zeros(q, k, v),
    )
    return dq, dk, dv


def flash_attn_2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn 2.8.3, flash_attn/flash_attn_interface.py: _flash_attn_varlen_forward.

    It takes (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, ...)
    and returns (out, softmax_lse, S_dmask, rng_state).
    """
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal)
    return out, lse


def flash_attn_2_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same file: _flash_attn_varlen_backward, which writes into dq, dk and dv.

    It takes (dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, ...).
    """
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gradients = _zeros(q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse, *gradients.values(), cu_q, cu_k, max_q, max_k, 0.0, scale, causal, -1, -1, 0.0,
        None, deterministic,
    )  # fmt: skip
    return gradients["dq"], gradients["dk"], gradients["dv"]


def torch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """aten::_flash_attention_forward as torch/nn/attention/varlen.py calls it (torch 2.11 and 2.13)."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def torch_flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward, as there; without dropout its random state is two zeros."""
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, rng_state, unused, scale=scale
    )


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    named = {"dq": q, "dk": k, "dv": v}
    return {name: torch.zeros(x.shape, dtype=x.dtype, device=x.device) for name, x in named.items()}


LIBRARIES = {
    "flash_attn_4": Varlen(flash_attn_4_forward, flash_attn_4_backward),
    "flash_attn_2": Varlen(flash_attn_2_forward, flash_attn_2_backward),
    "torch_flash": Varlen(torch_flash_forward, torch_flash_backward),
}

SEQUENCES = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, bool causal, float scale"


@torch.library.custom_op(
    "neomoba::varlen_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SEQUENCES}, str library) -> (Tensor, Tensor)",
)
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [Hq, T] of packed sequences by LIBRARIES[library]; lse has no gradient.

    rest: cu_q, cu_k, max_q, max_k, causal, scale, library. An operator, so that compiled graphs hold it whole.
    """
    *sequences, library = rest
    return LIBRARIES[library].forward(q, k, v, *sequences)


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "neomoba::varlen_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SEQUENCES}, str library) -> (Tensor, Tensor, Tensor)",
)
def varlen_attention_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. rest: q, k, v, out, lse and what `varlen_attention` took after v."""
    *operands, library = rest
    return LIBRARIES[library].backward(grad_out.contiguous(), *operands)


@varlen_attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = varlen_attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return *gradients, *[None] * (2 + len(ctx.rest))


varlen_attention.register_autograd(_backward, setup_context=_keep_for_backward)
