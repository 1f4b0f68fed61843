"""Time and memory of MoBA and of torch's own attention on the same tensors.

On a CPU with one thread the clock is the CPU time of the process, which other users of the machine do not change; with
more threads it is wall time. On a GPU it is CUDA events. Every number is the least of several repetitions.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neomoba_dist.model.moba import moba_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    """What is measured: tokens and heads of one row, the rest as in moba_attention."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    top_k: int
    causal: bool
    dtype: str
    device: str
    threads: int


class Measured(NamedTuple):
    """Seconds of the forward pass and of forward + backward, and whose they are."""

    name: str
    forward: float
    both: float


def tensors(setting: Setting) -> list[Tensor]:
    """q, k, v [T, H, D] that require a gradient, and a gradient for the output."""
    generator = torch.Generator(device=setting.device).manual_seed(0)
    counts = (setting.heads, setting.kv_heads, setting.kv_heads, setting.heads)
    dtype = getattr(torch, setting.dtype)
    drawn = []
    for index, heads in enumerate(counts):
        shape = (setting.length, heads, setting.head_dim)
        x = torch.randn(shape, generator=generator, device=setting.device).to(dtype)
        drawn.append(x.requires_grad_(index < 3))
    return drawn


def moba(setting: Setting) -> Attention:
    """MoBA with its gate, from q, k, v to the output."""
    options: dict[str, Any] = {"block_size": setting.block_size, "top_k": setting.top_k, "causal": setting.causal}
    return lambda q, k, v: moba_attention(q, k, v, **options)


def sdpa(setting: Setting) -> Attention:
    """Full attention by torch on views of the same tensors."""
    grouped = setting.heads != setting.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=setting.causal, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return attention


def measure_moba(setting: Setting, repetitions: int) -> Measured:
    """Seconds of MoBA."""
    return Measured("moba", *_times(moba(setting), tensors(setting), setting, repetitions))


def measure_full(setting: Setting, repetitions: int) -> Measured:
    """Seconds of the fastest of torch's own full attentions."""
    inputs = tensors(setting)
    found = [
        Measured(name, *_times(attention, inputs, setting, repetitions)) for name, attention in _rivals(setting).items()
    ]
    return min(found, key=lambda measured: measured.both)


def _rivals(setting: Setting) -> dict[str, Attention]:
    """Full attention by name; on a GPU one entry per kernel that takes these tensors."""
    if setting.device == "cpu":
        return {"sdpa": sdpa(setting)}

    def with_backend(backend: SDPBackend) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(setting)(q, k, v)

        return attention

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    rivals = {name: with_backend(backend) for name, backend in backends.items()}
    rivals["flex"] = _flex(setting)
    return {name: attention for name, attention in rivals.items() if _runs(attention, setting)}


def _flex(setting: Setting) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    shape = (None, None, setting.length, setting.length)
    mask = create_block_mask(earlier, *shape, device=setting.device) if setting.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=setting.heads != setting.kv_heads)[0].transpose(0, 1)

    return attention


def _runs(attention: Attention, setting: Setting) -> bool:
    """Whether a kernel takes this dtype and head_dim, forward and backward."""
    q, k, v, grad = tensors(setting)
    try:
        torch.autograd.grad(attention(q, k, v), (q, k, v), grad)
    except RuntimeError:
        return False
    return True


def _times(attention: Attention, inputs: list[Tensor], setting: Setting, repetitions: int) -> tuple[float, float]:
    q, k, v, grad = inputs

    def forward() -> None:
        with torch.no_grad():
            attention(q, k, v)

    def both() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

    return _least(forward, setting, repetitions), _least(both, setting, repetitions)


def _least(work: Callable[[], None], setting: Setting, repetitions: int) -> float:
    """Seconds of the fastest repetition, after one to warm up."""
    if setting.device == "cpu":
        clock = time.process_time if setting.threads == 1 else time.perf_counter
        seconds = []
        for _ in range(repetitions + 1):
            start = clock()
            work()
            seconds.append(clock() - start)
        return min(seconds[1:])
    work()
    milliseconds = []
    for _ in range(repetitions):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        milliseconds.append(events[0].elapsed_time(events[1]))
    return min(milliseconds) / 1e3


def peak_bytes(setting: Setting, kind: str) -> int:
    """Most bytes above the inputs that forward + backward of `kind` ("moba" or "full") hold at once.

    On the CPU a fresh process measures its resident memory, so that nothing freed earlier hides the peak.
    """
    if setting.device == "cpu":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(_peak_in_this_process, setting, kind).result()
    inputs = tensors(setting)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _once(setting, kind, inputs)
    return torch.cuda.max_memory_allocated() - before


def _peak_in_this_process(setting: Setting, kind: str) -> int:
    torch.set_num_threads(setting.threads)
    small = setting._replace(length=min(setting.length, 1024))
    _once(small, kind, tensors(small))  # libraries and buffers that stay
    inputs = tensors(setting)
    before = _resident_bytes("VmRSS")
    _once(setting, kind, inputs)
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process; getrusage would count what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def _once(setting: Setting, kind: str, inputs: list[Tensor]) -> None:
    q, k, v, grad = inputs
    attention = moba(setting) if kind == "moba" else sdpa(setting)
    torch.autograd.grad(attention(q, k, v), (q, k, v), grad)
