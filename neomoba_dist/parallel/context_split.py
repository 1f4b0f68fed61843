"""How the tokens of a batch are dealt to the context-parallel ranks, and where the pieces of its documents then lie.

The flat axis of a Batch, padded to a multiple, is cut into equal units, `units` per rank. Round after round the units
go to the ranks in order, every second round in reverse: one unit per rank is the "contiguous" split, two the "zigzag"
one, and "block_cyclic" takes as many as make a unit about one MoBA block. With an even number of rounds, every rank has
the same number of causal (query, key) pairs of a document that fills the batch.

Everything follows from the number of tokens that a rank holds, so no layer has to be told.

Legend: T tokens of the batch with padding, S = T / ranks tokens of one rank; indices are global (of T) or local (of S).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from neomoba_dist.config import ModelConfig
from neomoba_dist.parallel.mesh import Mesh

SPLITS = ("block_cyclic", "zigzag", "contiguous")


@dataclass(frozen=True)
class ContextSplit:
    """`ranks` ranks hold `units` units of `unit` tokens each."""

    ranks: int
    units: int
    unit: int

    @classmethod
    def of_tokens(cls, tokens: int, ranks: int, split: str, block_size: int, multiple: int = 1) -> "ContextSplit":
        """The split of a batch of `tokens` tokens, padded so that every rank has a multiple of `multiple`."""
        local = -(-tokens // ranks)
        while local % multiple or local % _rounds(local, split, block_size):
            local += 1
        return cls.of_local(local, ranks, split, block_size)

    @classmethod
    def of_local(cls, local: int, ranks: int, split: str, block_size: int) -> "ContextSplit":
        """The split in which a rank holds `local` tokens."""
        units = _rounds(local, split, block_size)
        if local % units:
            raise ValueError(f"{local} tokens are no {split} share of {units} units; see ContextSplit.of_tokens")
        return cls(ranks, units, local // units)

    @property
    def local_tokens(self) -> int:
        """S"""
        return self.units * self.unit

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.local_tokens * self.ranks

    def unit_starts(self, rank: int) -> list[int]:
        """Global index of the first token of each of the rank's units, ascending."""
        return [
            (row * self.ranks + (self.ranks - 1 - rank if row % 2 else rank)) * self.unit for row in range(self.units)
        ]

    def owner(self, unit: int) -> int:
        """The rank that holds the unit."""
        row, place = divmod(unit, self.ranks)
        return self.ranks - 1 - place if row % 2 else place

    def global_index(self, rank: int, device: torch.device | None = None) -> Tensor:
        """Global index of every token of the rank, ascending: int64 [S]."""
        return self.indices_at(torch.arange(self.local_tokens, device=device), rank)

    def gathered_index(self, device: torch.device | None = None) -> Tensor:
        """Global index of every token when the ranks' tokens are laid end to end: int64 [T]."""
        place = torch.arange(self.num_tokens, device=device)
        return self.indices_at(place % self.local_tokens, place // self.local_tokens)

    def gathered_order(self, device: torch.device | None = None) -> Tensor:
        """The inverse: where each token stands when the ranks' tokens are laid end to end, int64 [T]."""
        owner, local = self.owners_of(torch.arange(self.num_tokens, device=device))
        return owner * self.local_tokens + local

    def indices_at(self, local: Tensor, rank: Tensor | int) -> Tensor:
        """Global indices of tokens by their local ones."""
        row = local // self.unit
        place = torch.where(row % 2 == 1, self.ranks - 1 - rank, rank)
        return (row * self.ranks + place) * self.unit + local % self.unit

    def owners_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Owner and local index of tokens by their global ones."""
        row, place = index // self.unit // self.ranks, index // self.unit % self.ranks
        owner = torch.where(row % 2 == 1, self.ranks - 1 - place, place)
        return owner, row * self.unit + index % self.unit

    def tokens_before(self, rank: int, index: int) -> int:
        """How many of the rank's tokens have a global index below `index`: also the local index of that token."""
        starts = self.unit_starts(rank)
        whole = bisect_right(starts, index) - 1
        return 0 if whole < 0 else whole * self.unit + min(self.unit, index - starts[whole])

    def merged(self, group: int) -> "ContextSplit":
        """The split that groups of `group` neighbouring ranks make, each group's tokens in ascending order."""
        return ContextSplit(self.ranks // group, self.units, self.unit * group)


def _rounds(local: int, split: str, block_size: int) -> int:
    """Units per rank."""
    if split == "contiguous":
        return 1
    return 2 if split == "zigzag" else 2 * max(1, local // (2 * block_size))


class Segment(NamedTuple):
    """The part of one document within one unit: global indices, and the borders of the document."""

    start: int
    stop: int
    document_start: int
    document_stop: int


def segments(split: ContextSplit, rank: int, borders: Sequence[int]) -> list[Segment]:
    """What the rank holds, in local order. borders: those of the documents, ascending, repeated for empty ones."""
    return list(_segments(split, split.unit_starts(rank), borders))


def _segments(split: ContextSplit, starts: Sequence[int], borders: Sequence[int]) -> Iterator[Segment]:
    for start in starts:
        position, stop = start, start + split.unit
        while position < stop:
            document = bisect_right(borders, position)
            end = min(stop, borders[document])
            yield Segment(position, end, borders[document - 1], borders[document])
            position = end


@dataclass(frozen=True)
class Pieces:
    """MoBA's blocks cut at the borders of units, so that each piece lies whole on one rank; int64 on the CPU, [P].

    Ascending; `block` counts the blocks of all documents, as moba.block_means does; `local` is the piece's first token
    on its owner, `number` its place among the owner's pieces.
    """

    start: Tensor
    length: Tensor
    block: Tensor
    owner: Tensor
    local: Tensor
    number: Tensor
    num_blocks: int

    @cached_property
    def first(self) -> Tensor:
        """The first piece of every block: [num_blocks + 1]."""
        return torch.searchsorted(self.block, torch.arange(self.num_blocks + 1))

    def of(self, rank: int) -> Tensor:
        """The rank's pieces, ascending, which is their order on the rank."""
        return (self.owner == rank).nonzero()[:, 0]


def pieces(split: ContextSplit, borders: Sequence[int], block_size: int) -> Pieces:
    """Cut the blocks of all documents. borders: from 0 to T."""
    cu = torch.tensor(borders)
    counts = (cu.diff() + block_size - 1) // block_size
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first_block = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block_starts = cu[document] + (torch.arange(len(document)) - first_block[document]) * block_size
    start = torch.cat((block_starts, torch.arange(0, split.num_tokens, split.unit))).unique()
    stop = torch.cat((start[1:], cu[-1:]))
    owner, local = split.owners_of(start)
    number = torch.empty_like(start)
    for rank in range(split.ranks):
        mine = owner == rank
        number[mine] = torch.arange(int(mine.sum()))
    return Pieces(
        start=start,
        length=stop - start,
        block=torch.searchsorted(block_starts, start, right=True) - 1,
        owner=owner,
        local=local,
        number=number,
        num_blocks=len(document),
    )


AnyBatch = TypeVar("AnyBatch", bound=Any)  # data/batch.py's Batch; this package knows its fields, not its class


def split_batch(batch: AnyBatch, split: ContextSplit, rank: int) -> AnyBatch:
    """The rank's share of a batch: its tokens, labels, masks and positions; `cu_seqlens` stays that of all T tokens.

    The tokens that pad the batch to T are a document of their own, at position -1, and count nowhere.
    """
    padding = split.num_tokens - len(batch.input_ids)
    index = split.global_index(rank)

    def share(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, padding), value=fill)[index.to(tensor.device)]

    end = batch.cu_seqlens.new_full((1,), split.num_tokens)  # always, so that shapes stay fixed
    return replace(
        batch,
        input_ids=share(batch.input_ids, 0),
        labels=share(batch.labels, -100),
        position_ids=share(batch.position_ids, -1),
        cu_seqlens=torch.cat((batch.cu_seqlens, end)),
        token_type_ids=None if batch.token_type_ids is None else share(batch.token_type_ids, 0),
        next_sentence_labels=None if (labels := batch.next_sentence_labels) is None else share(labels, -100),
    )


def context_split(local_tokens: int, mesh: Mesh, config: ModelConfig) -> ContextSplit:
    """How the tokens lie of which this rank holds `local_tokens`."""
    return ContextSplit.of_local(local_tokens, mesh["cp"].size, mesh.context_split, config.moba_block_size)


def padded_split(tokens: int, mesh: Mesh, config: ModelConfig) -> ContextSplit:
    """How a micro-batch of `tokens` tokens is padded and dealt out."""
    multiple = mesh["tp"].size if mesh.sequence_parallel else 1
    return ContextSplit.of_tokens(tokens, mesh["cp"].size, mesh.context_split, config.moba_block_size, multiple)


def local_share(batch: AnyBatch, mesh: Mesh, config: ModelConfig) -> AnyBatch:
    """This rank's share of a micro-batch, which all its context-parallel ranks hold."""
    if mesh["cp"].size == 1:
        return batch
    return split_batch(batch, padded_split(len(batch.input_ids), mesh, config), mesh["cp"].index)
