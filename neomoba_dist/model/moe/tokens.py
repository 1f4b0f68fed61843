"""Where the tokens that this rank routes stand in the whole micro-batch, however it is split over cp and sp.

Shape letters: S tokens of this rank, T tokens of its shard of the sequence (cp), H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.parallel.comm import all_gather
from neomoba_dist.parallel.context_split import ContextSplit, context_split
from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Tokens:
    """number_S: int64, token of the micro-batch (row * length + place). valid_S: not padding. rows, length: of all.

    split: how the micro-batch, padded, lies over cp; None where it does not.
    """

    number_S: torch.Tensor
    valid_S: torch.Tensor
    rows: int
    length: int
    split: ContextSplit | None

    @classmethod
    def of(
        cls,
        position_ids_T: torch.Tensor,
        count: int,
        row_length: int | None,
        mesh: Mesh,
        config: ModelConfig,
        *,
        training: bool = True,
    ) -> "Tokens":
        """`count` tokens of this rank: its part of the shard with sequence parallelism, else all of it.

        row_length: tokens of a row, None where the micro-batch is one row. training: otherwise only `valid_S` matters,
        and the tokens may be any, as in decoding.
        """
        device, total, split = position_ids_T.device, len(position_ids_T), None
        number_T = torch.arange(total, device=device)
        if training and mesh["cp"].size > 1:
            split = context_split(total, mesh, config)
            number_T, total = split.global_index(mesh["cp"].index, device), split.num_tokens
        start = mesh["tp"].index * count if mesh.sequence_parallel else 0
        valid_S = position_ids_T.narrow(0, start, count) >= 0
        length = row_length if training and row_length else total
        return cls(number_T.narrow(0, start, count), valid_S, total // length, length, split)

    @property
    def row_S(self) -> torch.Tensor:
        """Row of every token."""
        return self.number_S // self.length

    @property
    def here_of_row(self) -> int:
        """Most tokens of one row on this rank."""
        return min(self.length, len(self.number_S))

    def gather(self, values_S: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        """The values [S, ...] of all tokens of the micro-batch in their order, [rows * length, ...], on every rank."""
        if mesh.sequence_parallel:
            values_S = all_gather(values_S, mesh, "tp").flatten(0, 1)
        if self.split is not None:
            order = self.split.gathered_order(values_S.device)
            values_S = all_gather(values_S, mesh, "cp").flatten(0, 1).index_select(0, order)
        return values_S[: self.rows * self.length]

    def noise(self, size: int, width: float, key: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Numbers in [1 - width, 1 + width), float64 [S, size]: a function of `key` and of the place in the row alone.

        So they depend on no layout and are the same again when a layer is recomputed or a run resumed. Rows of one
        update get the same ones. Source: the finaliser of MurmurHash3, over a counter.
        """
        state = torch.zeros((), dtype=torch.int64, device=self.number_S.device)
        for part in key:
            state = _mix(state + (part & 0x7FFFFFFFFFFFFFFF))
        place = _mix(state + self.number_S % self.length)
        bits = _mix(place[:, None] + torch.arange(size, device=place.device))
        return 1 - width + 2 * width * ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) / 2**53


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Scatter 64 bits over each other. torch's right shift repeats the sign bit, so that is masked out."""
    bits = (bits ^ (bits >> 33 & 0x7FFFFFFF)) * -0x00AE502812AA7333  # 0xFF51AFD7ED558CCD
    bits = (bits ^ (bits >> 33 & 0x7FFFFFFF)) * -0x3B314601E57A13AD  # 0xC4CEB9FE1A85EC53
    return bits ^ (bits >> 33 & 0x7FFFFFFF)
