"""Dropout (arXiv 1207.0580) whose masks depend on no layout.

Whether a number is dropped is a function of (seed, step, layer, row, place in the row, feature): the same on every
layout, when a layer is recomputed, and after a resume. Source of the random bits: model/normal.py.

Shape letters: S tokens of this rank, H hidden size.
"""

import hashlib
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.normal import GAMMA, scramble, signed
from neomoba_dist.parallel.context_split import context_split
from neomoba_dist.parallel.mesh import Mesh


def draws_of_tokens(
    row_ids: torch.Tensor, count: int, row_length: int | None, config: ModelConfig, mesh: Mesh, key: tuple[int, int]
) -> torch.Tensor:
    """What the masks of each of this rank's tokens are drawn from: int64 [S], on the mesh's device.

    row_ids: of the micro-batch, int64 [rows]. count: tokens of this rank's share of the sequence. row_length: tokens of
    a row; None: a micro-batch is one row. key: seed, and step of training.
    """
    device = mesh.device
    number = torch.arange(count, device=device)
    if mesh["cp"].size > 1:
        number = context_split(count, mesh, config).global_index(mesh["cp"].index, device)
    row, place = torch.zeros_like(number), number
    if row_length is not None:
        # beyond the last row lies what pads the micro-batch over cp
        row, place = (number // row_length).clamp(max=len(row_ids) - 1), number % row_length
    rows = scramble(row_ids.to(device) * GAMMA + _key("{}:{}".format(*key)))
    draws = scramble(place * GAMMA + rows[row])
    if mesh.sequence_parallel:
        draws = draws.tensor_split(mesh["tp"].size)[mesh["tp"].index]
    return draws


class Dropout(nn.Module):
    """x [S, H] with each number dropped with probability `rate`, the others divided by 1 - rate.

    name: of the layer whose output it is. Without `draws_S` (`draws_of_tokens`), as in evaluation, nothing is dropped.
    """

    key: torch.Tensor

    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self.limit, self.scale = round(rate * 2**63), 1 / (1 - rate)
        # a tensor, so that a compiled graph serves all layers
        self.register_buffer("key", torch.tensor(_key(name)), persistent=False)

    def forward(self, x_SH: torch.Tensor, draws_S: torch.Tensor | None) -> torch.Tensor:
        if draws_S is None:
            return x_SH
        layer_S = scramble(draws_S * GAMMA + self.key)
        feature_H = torch.arange(x_SH.shape[1], device=x_SH.device)
        kept_SH = scramble(feature_H * GAMMA + layer_S[:, None]) >= self.limit
        return torch.where(kept_SH, x_SH * self.scale, 0)


class EmbeddingDropout(nn.Module):
    """Dropout of the embedding with its positions: State -> State (model/block.py). name: whose masks these are."""

    def __init__(self, config: ModelConfig, name: str = "embedding") -> None:
        super().__init__()
        self.dropout = Dropout(name, config.dropout)

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest, packed = state
        return self.dropout(hidden, packed.draws), *rest, packed


def _key(name: str) -> int:
    return signed(int.from_bytes(hashlib.sha256(f"dropout:{name}".encode()).digest()[:8], "little"))
