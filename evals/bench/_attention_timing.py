"""Time (by _timing.py) and memory of MoBA, of full attention and of other MoBAs on the same tensors."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from evals.bench._memory import peak_above, resident_bytes
from evals.bench._timing import least
from evals.cli import EvalError
from neomoba_dist.model.attention.moba import moba_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LONGEST_FLEX = 32768  # each length is compiled anew, and its kernels are the same; beyond, the others are rivals enough
FLEX_BLOCK = 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LIBRARIES = {"flash_attn_4": "flash_attn.cute", "flash_attn_2": "flash_attn"}


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


class Compared(NamedTuple):
    """Full attention by each kernel that ran, other implementations of MoBA, and ours."""

    rivals: list[Measured]
    peers: list[Measured]
    moba: Measured


def measure(setting: Setting, repetitions: int, names: Sequence[str] | None = None) -> Compared:
    """Seconds of all, which take turns. names: of the rivals; None: all. Raises EvalError where none of them runs."""
    q, k, v, grad = tensors(setting)
    dense, peers = rivals(setting, names), moba_peers(setting)
    if not dense:
        wanted = f"--rivals {','.join(names)}: none of them" if names else "no kernel of full attention"
        raise EvalError(f"{wanted} runs here, as the lines above say; name others with --rivals")
    forward, both = {}, {}
    for name, attention in {**dense, **peers, "moba": moba(setting)}.items():
        forward[name] = partial(_forward, attention, q, k, v)
        both[name] = partial(_both, attention, q, k, v, grad)
    on: dict[str, Any] = {"device": setting.device, "threads": setting.threads, "repetitions": repetitions}
    seconds = {name: least(works, **on) for name, works in (("forward", forward), ("both", both))}
    found = [Measured(name, seconds["forward"][name], seconds["both"][name]) for name in forward]
    return Compared(found[: len(dense)], found[len(dense) : -1], found[-1])


def measure_forward(setting: Setting, repetitions: int) -> float:
    """Seconds of MoBA's forward pass alone, for lengths at which full attention takes too long."""
    q, k, v, _ = (x.detach() for x in tensors(setting))
    works = {"moba": partial(_forward, moba(setting), q, k, v)}
    return least(works, device=setting.device, threads=setting.threads, repetitions=repetitions)["moba"]


def rivals(setting: Setting, names: Sequence[str] | None = None) -> dict[str, Attention]:
    """Full attention by name; on a GPU one entry per kernel that is installed and takes these tensors.

    names: of those wanted; None: all.
    """
    if setting.device == "cpu":
        return {"sdpa": sdpa(setting)}
    makers: dict[str, Callable[[], Attention]] = {
        **{name: partial(_with_backend, setting, backend) for name, backend in BACKENDS.items()},
        **{name: partial(_library, setting, module) for name, module in LIBRARIES.items()},
    }
    if setting.length <= LONGEST_FLEX and setting.length % FLEX_BLOCK == 0:
        makers["flex"] = partial(_flex, setting)
    return _those_that_run({name: make for name, make in makers.items() if names is None or name in names}, setting)


def moba_peers(setting: Setting) -> dict[str, Attention]:
    """Other MoBAs that are installed and take these tensors: fla's, which is causal and repeats no KV heads."""
    if setting.device == "cpu" or not setting.causal or setting.heads != setting.kv_heads:
        return {}
    return _those_that_run({"fla_moba": partial(_fla_moba, setting)}, setting)


def _with_backend(setting: Setting, backend: SDPBackend) -> Attention:
    full = sdpa(setting)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return full(q, k, v)

    return attention


def _library(setting: Setting, module: str) -> Attention:
    """flash_attn_func of flash-attn 2.8.3, which returns the output, or flash-attn-4 4.0.0b36: output and logsumexp.

    Both take [B, T, H, D]. Not through our varlen door: for one document their own function is what a user would take.
    """
    function = importlib.import_module(module).flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q[None], k[None], v[None], causal=setting.causal)
        return (found[0] if isinstance(found, tuple) else found)[0]

    return attention


def _fla_moba(setting: Setting) -> Attention:
    """fla-org/flash-linear-attention, fla/ops/moba/parallel.py, on flash-attn 2."""
    function = importlib.import_module("fla.ops.moba.parallel").parallel_moba
    borders = torch.tensor([0, setting.length], dtype=torch.int32, device=setting.device)
    options = {"max_seqlen": setting.length, "chunk_size": setting.block_size, "topk": setting.top_k}
    return lambda q, k, v: function(q[None], k[None], v[None], borders, **options)[0]


def causal_block_mask(length: int, device: str) -> BlockMask:
    """flex_attention's own description of a causal mask, without the [T, T] tensor that create_block_mask makes.

    length: a multiple of FLEX_BLOCK.
    """
    rows = torch.arange(length // FLEX_BLOCK, dtype=torch.int32, device=device)
    diagonal = torch.zeros(len(rows), len(rows), dtype=torch.int32, device=device)
    diagonal[:, 0] = rows
    ones, below = torch.ones_like(rows), rows.expand(len(rows), -1).contiguous()
    return BlockMask.from_kv_blocks(
        ones[None, None], diagonal[None, None], rows[None, None], below[None, None], FLEX_BLOCK, _is_earlier,
        (length, length),
    )  # fmt: skip


def _is_earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(setting: Setting) -> Attention:
    # each length leaves two graphs on one function, which runs uncompiled, with all scores in memory, beyond eight
    torch._dynamo.reset()
    mask = causal_block_mask(setting.length, setting.device) if setting.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=setting.heads != setting.kv_heads)[0].transpose(0, 1)

    return attention


def _those_that_run(makers: dict[str, Callable[[], Attention]], setting: Setting) -> dict[str, Attention]:
    """What is installed and takes these tensors, forward and backward; a line for each that does not."""
    q, k, v, grad = tensors(setting)
    found = {}
    for name, make in makers.items():
        try:
            attention = make()
            _both(attention, q, k, v, grad)
        except Exception as error:  # whatever a kernel or its compiler raises, the others can still be measured
            reason = (str(error).splitlines() or [""])[0][:200]
            print(f"{name} left out: {type(error).__name__}: {reason}", file=sys.stderr)
        else:
            found[name] = attention
    return found


def _forward(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        attention(q, k, v)


def _both(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def peak_bytes(setting: Setting, kind: str) -> int:
    """Most bytes above the inputs that forward + backward of `kind` hold at once: "moba", or "full" (a GPU's flash).

    On the CPU a fresh process measures its resident memory, so that nothing freed earlier hides the peak.
    """
    if setting.device == "cpu":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(_peak_in_this_process, setting, kind).result()
    return peak_above(partial(_once, setting, kind, tensors(setting)), setting.device)


def _peak_in_this_process(setting: Setting, kind: str) -> int:
    torch.set_num_threads(setting.threads)
    small = setting._replace(length=min(setting.length, 1024))
    _once(small, kind, tensors(small))  # libraries and buffers that stay
    inputs = tensors(setting)
    before = resident_bytes("VmRSS")
    _once(setting, kind, inputs)
    return max(0, resident_bytes("VmHWM") - before)


def _once(setting: Setting, kind: str, inputs: list[Tensor]) -> None:
    q, k, v, grad = inputs
    if kind == "moba":
        return _both(moba(setting), q, k, v, grad)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if setting.device == "cuda" else nullcontext():
        return _both(sdpa(setting), q, k, v, grad)
