"""Which kernel runs where, for full attention and for MoBA: the one place that decides.

A table lists kernels in the order of preference, each with what it takes; the first that takes a call runs it, unless
another was measured to be faster on this card (tuned.py) and takes it too. Nothing here reads a value from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.library.varlen import LIBRARIES
from neomoba_dist.model.attention.kernels.tuned import full_key, moba_key, tuned
from neomoba_dist.model.optional import is_available, log_choice

HALF = (torch.float16, torch.bfloat16)
TRITON_DTYPES = (*HALF, torch.float32)
LEAST_FOR_CUDNN = 4096  # it plans anew for each length; torch's own kernel is quick enough below


class Call(NamedTuple):
    """What a choice depends on. packed: the tokens are those of several documents."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    tokens: int
    packed: bool


def _on_cpu(call: Call) -> bool:
    return call.device.type == "cpu"


def _varlen(call: Call) -> bool:
    return call.device.type == "cuda" and call.dtype in HALF and call.head_dim % 8 == 0 and call.head_dim <= 256


def _flash_attn_4(call: Call) -> bool:
    """Hopper and Blackwell, by `_validate_head_dims` of flash_attn/cute/interface.py."""
    if not (_varlen(call) and is_available("flash_attn_4")):
        return False
    major = compute_capability(call.device)
    return major == 9 or (major == 10 and (call.head_dim <= 128 or call.head_dim == 256))


def _flash_attn_2(call: Call) -> bool:
    return _varlen(call) and is_available("flash_attn")


def _cudnn(call: Call) -> bool:
    """One document on Hopper or Blackwell; its gradients are not the same bits every time (torch's sdp_utils.cpp)."""
    if not _varlen(call) or call.packed or call.head_dim > 128 or call.tokens < LEAST_FOR_CUDNN:
        return False
    return compute_capability(call.device) in (9, 10) and not torch.are_deterministic_algorithms_enabled()


# name -> what it takes; `full.RUN` has the functions
FULL_ATTENTION: dict[str, Callable[[Call], bool]] = {
    "documents": lambda call: _on_cpu(call) and call.packed,
    "cudnn": _cudnn,
    "flash_attn_4": _flash_attn_4,
    "flash_attn_2": _flash_attn_2,
    "torch_flash": lambda call: _varlen(call) and call.packed,
    "sdpa": lambda call: True,
}


def full_attention_kernel(call: Call) -> str:
    """The kernel of FULL_ATTENTION that runs this call; logged once per device and dtype, except in compiled layers."""
    on_gpu, key = call.device.type == "cuda", full_key(call.dtype, call.head_dim, call.packed)
    measured = tuned(key, call.tokens) if on_gpu else None
    if measured in FULL_ATTENTION and FULL_ATTENTION[measured](call):
        return measured
    name = next(name for name, takes in FULL_ATTENTION.items() if takes(call))
    if not torch.compiler.is_compiling():
        documents = "packed documents" if call.packed else "one document"
        log_choice(f"full attention of {documents} in {call.dtype} on {call.device.type}", name)
    return name


class MobaCall(NamedTuple):
    """What the choice for MoBA depends on.

    gathered: elements of the queries once for each other block that they choose. ordinary: every query attends, and the
    keys are those of the same documents; neither spans nor earlier keys. lse_gradient: the logsumexp has a gradient.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int = 0
    tokens: int = 0
    gathered: int = 0
    ordinary: bool = True
    lse_gradient: bool = False

    @classmethod
    def of(cls, problem: Problem, lse_gradient: bool = False) -> MobaCall:
        """From the arguments of an attention operator."""
        q, layout = problem.q, problem.layout
        others = 0 if problem.block_indices is None else problem.block_indices.shape[2] - 1
        ordinary = layout.spans is None and layout.cu_seqlens_k is None and layout.offsets is None and len(q) > 0
        gathered = q.numel() * others
        return cls(q.device, q.dtype, q.shape[2], layout.block_size, len(q), gathered, ordinary, lse_gradient)


def _runs_triton(call: MobaCall) -> bool:
    return call.device.type == "cuda" and gate_kernel(call.dtype, call.device) == "triton"


def _by_library(takes: Callable[[Call], bool], call: MobaCall) -> bool:
    """Libraries find rows by 32 bits, and their backward passes take no gradient of the logsumexp."""
    if not (call.ordinary and not call.lse_gradient and call.gathered < 2**31 and is_available("triton")):
        return False
    return takes(Call(call.device, call.dtype, call.head_dim, 0, True))


# As FULL_ATTENTION. Whether a library is faster than Triton is for `tuned` to say; without it they run by name alone.
MOBA: dict[str, Callable[[MobaCall], bool]] = {
    "triton": _runs_triton,
    **{name: partial(_by_library, FULL_ATTENTION[name]) for name in LIBRARIES},
    "torch": lambda call: True,
}


def moba_kernel(call: MobaCall, impl: str = "auto") -> str:
    """The kernel of MOBA that attends; logged once per device and dtype.

    impl: "auto" or a name of MOBA. "triton" also runs on the CPU, in its interpreter (TRITON_INTERPRET=1); where a
    library was asked for, Triton takes what it does not, such as the parts of context parallelism.

    Raises:
        ValueError: Triton or a library was asked for, and cannot run on this device and dtype.
    """
    if impl in LIBRARIES:
        if MOBA[impl](call):
            return impl
        if not MOBA[impl](MobaCall(call.device, call.dtype, call.head_dim)):
            raise ValueError(f'impl="{impl}" is not installed or takes no {call.dtype}, D {call.head_dim} here')
        return "triton"
    if impl != "auto":
        return gate_kernel(call.dtype, call.device, impl)
    measured = tuned(moba_key("moba", call.dtype, call.head_dim, call.block_size), call.tokens)
    if measured in MOBA and MOBA[measured](call):
        return measured
    name = next(name for name, takes in MOBA.items() if takes(call))
    log_choice(f"MoBA attention in {call.dtype} on {call.device.type}", name)
    return name


def gate_kernel(dtype: torch.dtype, device: torch.device, impl: str = "auto") -> str:
    """What runs MoBA's gate on such queries: "torch" or "triton"; impl: one of them, or "auto".

    Raises:
        ValueError: "triton" was asked for, and cannot run.
    """
    known = dtype in TRITON_DTYPES and is_available("triton")
    if impl == "auto":
        return "triton" if device.type == "cuda" and known else "torch"
    if impl == "triton" and not (known and (device.type == "cuda" or interprets_triton())):
        raise ValueError(f'impl="triton" needs triton, a GPU and half precision or float32, got {dtype} on {device}')
    return impl


def interprets_triton() -> bool:
    """Whether Triton was imported in its interpreter mode."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def compute_capability(device: torch.device) -> int:
    """Major compute capability of a GPU: 9 is Hopper, 10 Blackwell."""
    return _capability(-1 if device.index is None else device.index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(None if index < 0 else index)[0]
