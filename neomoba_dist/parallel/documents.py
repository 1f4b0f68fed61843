"""Borders of packed documents: what whoever packs them and whoever attends within them agree on."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, total: int, name: str = "cu_seqlens") -> None:
    """Check document borders on the host, once, where a batch is built; kernels do not read values on a device.

    Args:
        cu_seqlens: int32 [documents + 1]; empty documents (repeated borders) are legal.
        total: number of tokens that the documents must cover.
        name: what the error message calls the argument.

    Raises:
        ValueError: wrong dtype or shape, first border not 0, last not `total`, or a border below the one before it.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"{name} must be int32 of shape [documents + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != total:
        raise ValueError(f"{name} must run from 0 to {total} (the number of tokens), got {borders[0]}..{borders[-1]}")
    for previous, border in pairwise(borders):
        if border < previous:
            raise ValueError(f"{name} must not decrease, got {border} after {previous}")
