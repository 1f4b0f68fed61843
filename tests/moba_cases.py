"""Inputs of MoBA's tests: shapes that count, random tensors, and one way of computing at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cpu import attend as gathered
from neomoba_dist.model.attention.kernels.cpu.tasks import Document
from neomoba_dist.model.attention.kernels.layout import Problem

HEADS = {"MHA": (3, 3), "GQA": (4, 2), "MQA": (3, 1)}
DOCUMENTS = {
    "one": [0, 61],
    "four": [0, 0, 24, 25, 61],
    "seven": [0, 16, 16, 17, 40, 59, 61, 61],
}


def tensors(tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q [T, Hq, D], k, v [T, Hkv, D] and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(index < 3) for index, x in enumerate(drawn)]


def cu(borders: list[int]) -> Tensor:
    return torch.tensor(borders, dtype=torch.int32)


def force_method(patch: pytest.MonkeyPatch, method: str) -> None:
    """One way of computing for all documents: the choice between them depends on speed alone."""

    def choose(problem: Problem, doc: Document, block_indices: Tensor) -> list[Document]:
        return [doc._replace(method=method)]

    patch.setattr(gathered, "_choose_methods", choose)
