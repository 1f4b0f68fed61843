"""A short convolution over the keys, before they are rotated: it gathers what belongs together, so that a block's mean
says more about the block (FlashMoBA, "Optimizing Mixture of Block Attention", arXiv 2511.11571).

    k'[t] = k[t] + silu(sum_o w[o] * k[t + o])

Depthwise, with SiLU and a residual, as published. Causal models: o = -(width - 1) .. 0, as published. Bidirectional
ones: o = -(width // 2) .. width // 2, because there a key belongs to its right neighbour as much as to its left one.
It stands before the rotary embedding, so that scores go on depending on distances alone.

Shape letters: T tokens, N KV heads of this rank, D head size, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def tap_offsets(width: int, causal: bool) -> range:
    """Offsets o of the taps, in the order of the weights."""
    return range(1 - width, 1) if causal else range(-(width // 2), width // 2 + 1)


def add_taps(
    k_TND: torch.Tensor, weight_CW: torch.Tensor, causal: bool, shifted: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """The formula above. weight_CW: [N * D, W]. shifted(o): k[t + o] for every t, 0 beyond the document, [T, N, D].

    Sums in at least float32, always in the order of the taps: a cached step gives the same bits as a whole pass.
    """
    exact = torch.promote_types(k_TND.dtype, torch.float32)
    taps_WND = weight_CW.to(exact).t().unflatten(1, k_TND.shape[1:])
    total = torch.zeros_like(k_TND, dtype=exact)
    for tap, offset in zip(taps_WND, tap_offsets(len(taps_WND), causal), strict=True):
        total = total + tap * shifted(offset).to(exact)
    return (k_TND.to(exact) + F.silu(total)).to(k_TND.dtype)


def convolve_keys(k_TND: torch.Tensor, weight_CW: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool) -> torch.Tensor:
    """Convolve the keys of packed documents; nothing crosses a border. cu_seqlens: int32 [documents + 1]."""
    index = torch.arange(len(k_TND), device=k_TND.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)

    def shifted(offset: int) -> torch.Tensor:
        if offset == 0:
            return k_TND
        source = index + offset
        inside = (source >= 0) & (source < len(index)) & (document.roll(-offset) == document)
        return k_TND.roll(-offset, 0) * inside[:, None, None]

    return add_taps(k_TND, weight_CW, causal, shifted)
