# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""What the Triton kernels of MoBA share: tile sizes, gathered loads, the inner loops over keys.

Nothing here runs before the first GPU call; importing this module needs triton.

Legend: BM rows (queries) and BN keys per tile, BD head_dim padded to a power of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from neomoba_dist.model.attention.kernels.layout import Problem
from neomoba_dist.model.attention.kernels.tuned import moba_key, tuned

Rest = ParamSpec("Rest")
Result = TypeVar("Result")
Operand = TypeVar("Operand", Tensor, Problem)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# A kernel that is launched. By default Triton compiles one more variant wherever an integer becomes 1 or changes its
# divisibility by 16; sizes vary from step to step and gain nothing from it, unlike strides, which tell alignment.
SIZES = (
    "block_size", "chunk", "chunks", "columns", "documents", "first_head", "group", "heads", "heads_per_row", "keys",
    "kv_heads", "num_blocks", "num_kv_heads", "num_tiles", "parts", "places", "queries", "rows_per_kv_head", "section",
    "tokens",
)  # fmt: skip
kernel = triton.jit(do_not_specialize=SIZES)


class Tiles(NamedTuple):
    """How a kernel is cut and launched.

    descriptors: `selected_forward_kernel` loads whole tiles of keys and values by tensor descriptors, which is the
    tensor memory accelerator's work from Hopper on, and not by one pointer per row.
    atomics: `key_gradient_kernel` adds up dq too, in float32 and in no fixed order, and no other kernel does.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    atomics: bool = False


def choose_tiles(head_dim: int, dtype: torch.dtype, block_size: int, tokens: int) -> Tiles:
    """Tiles that fit the registers and shared memory of one SM; keys never exceed the block (padded to 16).

    Where this card was tuned, those that were the fastest for about so many queries.
    """
    measured = tuned(moba_key("tiles", dtype, head_dim, block_size), tokens)
    if measured is not None:
        return Tiles(*measured)
    keys = min(64, max(16, triton.next_power_of_2(block_size)))
    if dtype == torch.float32 and head_dim > 128:
        return Tiles(16, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, min(keys, 32), 4, 1) if head_dim > 64 else Tiles(64, min(keys, 32), 4, 2)
    if head_dim > 128:
        return Tiles(64, min(keys, 32), 8, 2)
    return Tiles(128, keys, 8 if head_dim > 64 else 4, 3)


def tiles_of(problem: Problem) -> Tiles:
    """`choose_tiles` for a call."""
    tokens, _, head_dim = problem.q.shape
    return choose_tiles(head_dim, problem.q.dtype, problem.layout.block_size, tokens)


def choose_key_tiles(head_dim: int, dtype: torch.dtype, block_size: int, tokens: int) -> Tiles:
    """The same for the gradients of keys and values, which keep two sums of [keys, BD] in registers."""
    measured = tuned(moba_key("key_tiles", dtype, head_dim, block_size), tokens)
    if measured is not None:
        return Tiles(*measured)
    edge = max(16, triton.next_power_of_2(block_size))
    if dtype == torch.float32:
        return Tiles(16, min(edge, 32), 8, 1) if head_dim > 128 else Tiles(32, min(edge, 32), 4, 1)
    if head_dim > 128:
        return Tiles(32, min(edge, 64), 8, 1)
    return Tiles(32, min(edge, 128), 8, 3)  # compiled for sm_90 at D 128: 254 registers; with 64 rows it spills


def choose_gate_tiles(head_dim: int, exact: bool) -> Tiles:
    """The same for the gate, where `keys` are blocks; exact float32 products keep their operands in registers."""
    if not exact:
        return Tiles(64, 64, 4, 3)
    return Tiles(16, 16, 4, 1) if head_dim > 128 else Tiles(32, 32, 8, 1)


def padded(head_dim: int) -> int:
    """BD: the power of two, at least 16, that tl.dot needs."""
    return max(16, triton.next_power_of_2(head_dim))


def last_contiguous(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, as the kernels ask, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_current_column(problem: Problem) -> Tensor:
    """Block indices as the kernels take them, current block first: queries that attend to spans have none."""
    assert problem.block_indices is not None
    if problem.layout.spans is None:
        return problem.block_indices.contiguous()
    return torch.nn.functional.pad(problem.block_indices, (1, 0), value=-1)


def on_its_device(
    function: Callable[Concatenate[Operand, Rest], Result],
) -> Callable[Concatenate[Operand, Rest], Result]:
    """Run a function on the device of its first argument: Triton launches on whichever device is the current one."""

    @functools.wraps(function)
    def run(first: Operand, *args: Rest.args, **options: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first.q):
            return function(first, *args, **options)

    return run


@triton.jit
def load_rows(x, rows, valid, head, stride_t, stride_h, DIM: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of one head of x [tokens, heads, DIM], zero where not valid; 64 bit offsets for a million tokens.

    valid: None where every row exists; then nothing is masked if DIM is BD.
    """
    d = tl.arange(0, BD)
    pointers = x + rows.to(tl.int64)[:, None] * stride_t + tl.cast(head, tl.int64) * stride_h + d[None, :]
    if valid is not None:
        found = tl.load(pointers, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    elif DIM != BD:
        found = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def store_rows(x, values, rows, valid, head, stride_t, stride_h, DIM: tl.constexpr, BD: tl.constexpr):
    """The reverse of load_rows, in the dtype of x."""
    d = tl.arange(0, BD)
    pointers = x + rows.to(tl.int64)[:, None] * stride_t + tl.cast(head, tl.int64) * stride_h + d[None, :]
    tl.store(pointers, values.to(x.dtype.element_ty), mask=valid[:, None] & (d < DIM)[None, :])


@triton.jit
def attend_tile(q, peak, total, acc, k, v, visible, scale, PRECISION: tl.constexpr):
    """One step of the online softmax: keys and values [BN, BD] of which each row sees `visible` [BM, BN]; None: all."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    raised = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(raised == float("-inf"), 0.0, raised)
    shrink = tl.exp2(peak - base)
    weights = tl.exp2(logits - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return raised, total, acc


@triton.jit
def attend_keys(
    q,
    k_pointer,
    v_pointer,
    k_tiles,
    v_tiles,
    head,
    first,
    seen_by_all,
    last,
    row_last,
    scale,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of the rows q [BM, BD] over the keys first..last, each row seeing those before its row_last.

    seen_by_all: every row sees the keys before it; whole tiles of those pass without masks, by the descriptors k_tiles
    and v_tiles (tiles [BN, 1, BD]) where given. The rest is masked as it is loaded: a descriptor would read keys of the
    next document, and weights of 0 times not-a-number reach all. row_last: None where rows differ in nothing but
    `last`. Returns the normalised output [BM, BD] and the logsumexp [BM] in powers of two, both
    float32.
    """
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    masked = first + tl.maximum(seen_by_all - first, 0) // BN * BN
    for start in range(first, masked, BN):
        if k_tiles is not None:
            k = tl.reshape(k_tiles.load([start, head, 0]), (BN, BD))
            v = tl.reshape(v_tiles.load([start, head, 0]), (BN, BD))
        else:
            n = start + tl.arange(0, BN)
            k = load_rows(k_pointer, n, None, head, k_stride_t, k_stride_h, DIM, BD)
            v = load_rows(v_pointer, n, None, head, v_stride_t, v_stride_h, DIM, BD)
        peak, total, acc = attend_tile(q, peak, total, acc, k, v, None, scale, PRECISION)
    for start in range(masked, last, BN):
        n = start + tl.arange(0, BN)
        k = load_rows(k_pointer, n, n < last, head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, n < last, head, v_stride_t, v_stride_h, DIM, BD)
        visible = (n < last)[None, :] if row_last is None else n[None, :] < row_last[:, None]
        peak, total, acc = attend_tile(q, peak, total, acc, k, v, visible, scale, PRECISION)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None], peak + tl.log2(total)


@triton.jit
def merge(out_a, lse_a, out_b, lse_b):
    """One attention over the union of two disjoint sets of keys; -inf marks an empty set."""
    base = tl.maximum(lse_a, lse_b)
    base = tl.where(base == float("-inf"), 0.0, base)
    weight_a, weight_b = tl.exp2(lse_a - base), tl.exp2(lse_b - base)
    total = weight_a + weight_b
    out = (out_a * weight_a[:, None] + out_b * weight_b[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
    return out, base + tl.log2(total)


@triton.jit
def gradient_tile(q, grad, lse, delta, dq, k, v, visible, scale, PRECISION: tl.constexpr):
    """Add the share of keys and values [BN, BD], of which each row sees `visible` (None: all), to dq [BM, BD]."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weights = tl.exp2(logits - lse[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    slope = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(slope.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def query_gradient(
    q,
    grad,
    lse,
    delta,
    k_pointer,
    v_pointer,
    head,
    first,
    seen_by_all,
    last,
    row_last,
    scale,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over keys of p (grad . v - delta) k [BM, BD]: the gradient of the queries, still without 1 / sqrt(D).

    Keys as in `attend_keys`.
    """
    dq = tl.zeros([BM, BD], tl.float32)
    masked = first + tl.maximum(seen_by_all - first, 0) // BN * BN
    for start in range(first, masked, BN):
        n = start + tl.arange(0, BN)
        k = load_rows(k_pointer, n, None, head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, None, head, v_stride_t, v_stride_h, DIM, BD)
        dq = gradient_tile(q, grad, lse, delta, dq, k, v, None, scale, PRECISION)
    for start in range(masked, last, BN):
        n = start + tl.arange(0, BN)
        k = load_rows(k_pointer, n, n < last, head, k_stride_t, k_stride_h, DIM, BD)
        v = load_rows(v_pointer, n, n < last, head, v_stride_t, v_stride_h, DIM, BD)
        visible = (n < last)[None, :] if row_last is None else n[None, :] < row_last[:, None]
        dq = gradient_tile(q, grad, lse, delta, dq, k, v, visible, scale, PRECISION)
    return dq
