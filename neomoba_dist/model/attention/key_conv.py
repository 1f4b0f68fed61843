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

from neomoba_dist.model.attention.kernels.layout import document_of
from neomoba_dist.parallel.context import with_halo
from neomoba_dist.parallel.context_split import ContextSplit
from neomoba_dist.parallel.mesh import Mesh


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


def inside_documents(
    tokens: int, cu_seqlens: torch.Tensor, width: int, causal: bool, mesh: Mesh, split: ContextSplit | None
) -> torch.Tensor:
    """For every tap, whether the key that it takes belongs to the same document as the token: bool [width, tokens].

    tokens, cu_seqlens, split: as of `convolve_keys`.
    """
    borders, device = cu_seqlens.long(), cu_seqlens.device
    index = torch.arange(tokens, device=device) if split is None else split.global_index(mesh["cp"].index, device)
    offsets = tap_offsets(width, causal)
    source = index + torch.arange(offsets.start, offsets.stop, device=device)[:, None]
    return (source >= 0) & (document_of(source, borders) == document_of(index, borders))


def convolve_keys(
    k_TND: torch.Tensor,
    weight_CW: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    mesh: Mesh,
    split: ContextSplit | None = None,
    inside_WT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve the keys of packed documents; nothing crosses a border. cu_seqlens: int32 [documents + 1].

    split: how the tokens lie over cp, if they do; k_TND are then this rank's, and cu_seqlens those of all. inside_WT:
    `inside_documents`, where it is known.
    """
    taps = weight_CW.shape[1]
    offsets = tap_offsets(taps, causal)
    before, after = -offsets.start, offsets.stop - 1
    if split is None:
        units = F.pad(k_TND, (0, 0, 0, 0, before, after))[None]
    else:
        units = with_halo(k_TND, before, after, mesh, "cp", split)
    width = units.shape[1] - before - after
    inside = inside_documents(len(k_TND), cu_seqlens, taps, causal, mesh, split) if inside_WT is None else inside_WT

    def shifted(offset: int) -> torch.Tensor:
        if offset == 0:
            return k_TND
        tap = before + offset
        return units[:, tap : tap + width].flatten(0, 1) * inside[tap, :, None, None]

    return add_taps(k_TND, weight_CW, causal, shifted)
