# ruff: noqa: ANN001, ANN201  (Triton reads annotations of kernels as types; arguments of kernels carry none)
"""Triton kernels of a mixture whose experts are all on this rank: sort, rows to experts and back, SwiGLU.

No size is read on the host. There is one row per (token, choice) pair, sorted by expert, tokens ascending; the choices
of no expert come last, and what stands in their rows is never read. The sort is a counting sort in two launches:
histograms of sections of the pairs, then ranks by comparison within a tile. No atomics: the same bits every time.

Legend: S tokens, H hidden size, K choices per token, E experts, EP at least E + 1 and a power of two, P = S * K rows,
I intermediate size; BT pairs, BM tokens or rows, BH or BI features per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# sizes that change from batch to batch: no variant for each of their divisors
kernel = triton.jit(do_not_specialize=("pairs", "section", "sections", "tokens"))

MOST_SECTIONS = 128  # near the number of SMs; every one reads the histograms of all
BT = 128


class SortedPairs(NamedTuple):
    """pair_P: int32, the (token * K + choice) of each row. slot_SK: int32, the row of each choice, -1 for none.

    borders: int32 [E + 1], the first row of each expert, and one beyond the last row of all.
    """

    pair_P: Tensor
    slot_SK: Tensor
    borders: Tensor

    @property
    def ends_E(self) -> Tensor:
        """One beyond the last row of each expert, as grouped products take it."""
        return self.borders[1:]


@kernel
def count_kernel(
    expert, counts, pairs, section, EXPERTS: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """counts [sections, EP]: how many choices of a section fall on each expert; bin EXPERTS: on none."""
    part = tl.program_id(0)
    count = tl.zeros([EP], tl.int32)
    for start in range(part * section, (part + 1) * section, BT):
        pair = start + tl.arange(0, BT)
        chosen = tl.load(expert + pair, mask=pair < pairs, other=-1).to(tl.int32)
        count += tl.histogram(tl.where(chosen < 0, EXPERTS, chosen), EP)
    tl.store(counts + part * EP + tl.arange(0, EP), count)


@kernel
def sort_kernel(
    expert, counts, pair_of_row, slot, borders, pairs, section, sections, EXPERTS: tl.constexpr, EP: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Give every pair of a section its row: those of earlier experts, of earlier sections, of the section before it."""
    part = tl.program_id(0)
    bins = tl.arange(0, EP)
    whole, earlier = tl.zeros([EP], tl.int32), tl.zeros([EP], tl.int32)
    for start in range(0, sections, BS):
        other = start + tl.arange(0, BS)
        cell = counts + other[:, None] * EP + bins[None, :]
        count = tl.load(cell, mask=(other < sections)[:, None], other=0)
        whole += tl.sum(count, 0)
        earlier += tl.sum(tl.where((other < part)[:, None], count, 0), 0)
    end = tl.cumsum(whole, 0)
    if part == 0:
        tl.store(borders + bins, end - whole, mask=bins <= EXPERTS)
    base = end - whole + earlier
    row_of_tile = tl.arange(0, BT)
    for start in range(part * section, (part + 1) * section, BT):
        pair = start + row_of_tile
        chosen = tl.load(expert + pair, mask=pair < pairs, other=-1).to(tl.int32)
        bin_of_pair = tl.where(chosen < 0, EXPERTS, chosen)
        same = (bin_of_pair[:, None] == bin_of_pair[None, :]) & (row_of_tile[None, :] < row_of_tile[:, None])
        row = tl.gather(base, bin_of_pair, 0) + tl.sum(same.to(tl.int32), 1)
        tl.store(pair_of_row + row, pair, mask=pair < pairs)
        tl.store(slot + pair, tl.where(chosen < 0, -1, row), mask=pair < pairs)
        base += tl.histogram(bin_of_pair, EP)


@kernel
def spread_kernel(
    x, slot, rows, tokens, HIDDEN: tl.constexpr, CHOICES: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """rows[slot[t, k]] = x[t] for every choice k that has a row."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (t < tokens)[:, None] & (h < HIDDEN)[None, :]
    value = tl.load(x + t.to(tl.int64)[:, None] * HIDDEN + h[None, :], mask=inside)
    for k in tl.static_range(CHOICES):
        row = tl.load(slot + t * CHOICES + k, mask=t < tokens, other=-1)
        tl.store(rows + row.to(tl.int64)[:, None] * HIDDEN + h[None, :], value, mask=inside & (row >= 0)[:, None])


@kernel
def sum_kernel(
    rows, more, weight, slot, out, tokens, HIDDEN: tl.constexpr, CHOICES: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over choices k of (weight[t, k] *) rows[slot[t, k]] (+ more[slot[t, k]]), in float32, in order."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (t < tokens)[:, None] & (h < HIDDEN)[None, :]
    total = tl.zeros([BM, BH], tl.float32)
    for k in tl.static_range(CHOICES):
        row = tl.load(slot + t * CHOICES + k, mask=t < tokens, other=-1)
        offset, there = row.to(tl.int64)[:, None] * HIDDEN + h[None, :], inside & (row >= 0)[:, None]
        value = tl.load(rows + offset, mask=there, other=0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + t * CHOICES + k, mask=t < tokens, other=0).to(tl.float32)[:, None]
        total += value
        if more is not None:
            total += tl.load(more + offset, mask=there, other=0).to(tl.float32)
    tl.store(out + t.to(tl.int64)[:, None] * HIDDEN + h[None, :], total.to(out.dtype.element_ty), mask=inside)


@kernel
def swiglu_kernel(
    gate, up, weight, pair_of_row, borders, out, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """out = weight of the choice * silu(gate) * up, rounded once."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < tl.load(borders + EXPERTS)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = there[:, None] & (i < WIDTH)[None, :]
    offset = row.to(tl.int64)[:, None] * WIDTH + i[None, :]
    g = tl.load(gate + offset, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + offset, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + tl.load(pair_of_row + row, mask=there, other=0), mask=there, other=0).to(tl.float32)
    tl.store(out + offset, (w[:, None] * (g * tl.sigmoid(g) * u)).to(out.dtype.element_ty), mask=inside)


@kernel
def swiglu_backward_kernel(
    gate, up, weight, pair_of_row, borders, grad, grad_gate, grad_up, grad_weight, pairs, EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Gradients of gate, up and the choices' weights. `grad`, of the product, is replaced by the product itself."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < tl.load(borders + EXPERTS)
    pair = tl.load(pair_of_row + row, mask=row < pairs, other=0)
    w = tl.load(weight + pair, mask=there, other=0).to(tl.float32)[:, None]
    total = tl.zeros([BM], tl.float32)
    for start in range(0, WIDTH, BI):
        i = start + tl.arange(0, BI)
        inside = there[:, None] & (i < WIDTH)[None, :]
        offset = row.to(tl.int64)[:, None] * WIDTH + i[None, :]
        g = tl.load(gate + offset, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + offset, mask=inside, other=0).to(tl.float32)
        grad_h = tl.load(grad + offset, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        total += tl.sum(grad_h * silu * u, 1)
        tl.store(grad + offset, (w * silu * u).to(grad.dtype.element_ty), mask=inside)
        grad_h *= w
        # the derivative of silu is sigmoid + silu (1 - sigmoid)
        slope = grad_h * u * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate + offset, slope.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + offset, (grad_h * silu).to(grad_up.dtype.element_ty), mask=inside)
    # the choices of no expert have rows, too, after all others: their gradient is zero
    tl.store(grad_weight + pair, total.to(grad_weight.dtype.element_ty), mask=row < pairs)


def sort_pairs(expert_SK: Tensor, num_experts: int) -> SortedPairs:
    """expert_SK: integers, -1 for a choice of no expert; at least one token."""
    pairs, device = expert_SK.numel(), expert_SK.device
    section = BT * max(1, triton.cdiv(pairs, BT * MOST_SECTIONS))
    sections = triton.cdiv(pairs, section)
    bins = max(16, triton.next_power_of_2(num_experts + 1))
    counts = torch.empty(sections, bins, dtype=torch.int32, device=device)
    pair_P = torch.empty(pairs, dtype=torch.int32, device=device)
    slot_SK = torch.empty(expert_SK.shape, dtype=torch.int32, device=device)
    borders = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    expert_SK = expert_SK.contiguous()
    count_kernel[(sections,)](expert_SK, counts, pairs, section, EXPERTS=num_experts, EP=bins, BT=BT)
    sort_kernel[(sections,)](
        expert_SK, counts, pair_P, slot_SK, borders, pairs, section, sections, EXPERTS=num_experts, EP=bins, BT=BT,
        BS=max(1, 4096 // bins),
    )  # fmt: skip
    return SortedPairs(pair_P, slot_SK, borders)


def spread_rows(x_SH: Tensor, pairs: SortedPairs) -> Tensor:
    """x [S, H] -> [P, H]: every token's row for each of its choices."""
    (tokens, hidden), choices = x_SH.shape, pairs.slot_SK.shape[1]
    rows_PH = x_SH.new_empty(len(pairs.pair_P), hidden)
    grid, tile = _token_grid(tokens, hidden)
    spread_kernel[grid](x_SH.contiguous(), pairs.slot_SK, rows_PH, tokens, HIDDEN=hidden, CHOICES=choices, **tile)
    return rows_PH


def sum_rows(
    rows_PH: Tensor, pairs: SortedPairs, more_PH: Tensor | None = None, weight_SK: Tensor | None = None
) -> Tensor:
    """Rows [P, H] (and more of them) -> [S, H]: each token's sum over its choices, weighted or not."""
    (tokens, choices), hidden = pairs.slot_SK.shape, rows_PH.shape[1]
    out_SH = rows_PH.new_empty(tokens, hidden)
    grid, tile = _token_grid(tokens, hidden)
    sum_kernel[grid](rows_PH, more_PH, weight_SK, pairs.slot_SK, out_SH, tokens, HIDDEN=hidden, CHOICES=choices, **tile)
    return out_SH


def _token_grid(tokens: int, hidden: int) -> tuple[tuple[int, int], dict[str, int]]:
    tile = {"BM": 8, "BH": min(256, triton.next_power_of_2(hidden))}
    return (triton.cdiv(tokens, tile["BM"]), triton.cdiv(hidden, tile["BH"])), tile


def weighted_swiglu(gate_PI: Tensor, up_PI: Tensor, weight_SK: Tensor, pairs: SortedPairs) -> Tensor:
    """weight * silu(gate) * up, [P, I]."""
    (rows, width), out_PI = gate_PI.shape, torch.empty_like(gate_PI)
    tile = {"BM": 4, "BI": min(512, triton.next_power_of_2(width))}
    swiglu_kernel[(triton.cdiv(rows, tile["BM"]), triton.cdiv(width, tile["BI"]))](
        gate_PI, up_PI, weight_SK, pairs.pair_P, pairs.borders, out_PI, EXPERTS=len(pairs.borders) - 1, WIDTH=width,
        **tile,
    )  # fmt: skip
    return out_PI


def weighted_swiglu_backward(
    grad_PI: Tensor, gate_PI: Tensor, up_PI: Tensor, weight_SK: Tensor, pairs: SortedPairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up [P, I] and weight [S, K]; and what `weighted_swiglu` gives, in the place of `grad_PI`."""
    rows, width = gate_PI.shape
    grad_gate, grad_up, grad_weight = (torch.empty_like(t) for t in (gate_PI, up_PI, weight_SK))
    tile = {"BM": 4, "BI": min(256, triton.next_power_of_2(width))}
    swiglu_backward_kernel[(triton.cdiv(rows, tile["BM"]),)](
        gate_PI, up_PI, weight_SK, pairs.pair_P, pairs.borders, grad_PI, grad_gate, grad_up, grad_weight, rows,
        EXPERTS=len(pairs.borders) - 1, WIDTH=width, **tile,
    )  # fmt: skip
    return grad_gate, grad_up, grad_weight, grad_PI
