"""Where the blocks of packed documents lie: one small description shared by routing and every attention kernel.

MoBA counts its blocks from the start of each document; the last block of a document may be short. Blocks of all
documents are numbered consecutively. The number of blocks depends on the values in `cu_seqlens`, so every array
over blocks is sized by an upper bound that only depends on shapes: nothing here copies a value from the device.

Legend: T queries, S keys, N blocks (upper bound), docs documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class PlacedBlocks(NamedTuple):
    """Documents and blocks of one micro-batch, found once for all layers (moba.place_blocks).

    table: borders among the queries, borders among the keys, position of the first query and number of the first block
    of every document: int64 [4, docs + 1]; int32 [5, docs + 1] if the Triton kernels are to read it, which also find
    `blocks` and `tiles` (kernels/triton/layout.py). borders: of the blocks among the keys, int32 [N + 1], if a library
    is to run (kernels/library/moba.py).
    """

    table: Tensor
    blocks: Tensor | None = None
    tiles: Tensor | None = None
    borders: Tensor | None = None


class DocumentPlace(NamedTuple):
    """Where one document lies: its queries, its keys, the position of its first query, and its blocks."""

    queries: slice
    keys: slice
    position: int
    blocks: range


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of all documents. Its tensors are made when first asked for; the Triton kernels make their own."""

    num_queries: int  # T
    num_keys: int  # S
    block_size: int
    num_blocks: int  # N, static upper bound
    device: torch.device
    cu_seqlens: Tensor | None = None  # as in moba_attention
    cu_seqlens_k: Tensor | None = None
    offsets: Tensor | None = None
    spans: Tensor | None = None  # [N, 2] start and length of every block, where blocks are given and not counted
    placed: PlacedBlocks | None = None  # what of the rest is known already

    @property
    def documents(self) -> int:
        return 1 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @cached_property
    def table(self) -> Tensor:
        """PlacedBlocks.table as int64."""
        if self.placed is not None:
            return self.placed.table.long()
        offset = torch.nn.functional.pad(self.q_offset, (0, 1))
        return torch.stack((self.cu_q, self.cu_k, offset, self.first_block))

    def places(self) -> Iterator[DocumentPlace]:
        """Every document, read from the device at once."""
        queries, keys, positions, blocks, *_ = self.table.tolist()
        for q, k, position, block in zip(pairwise(queries), pairwise(keys), positions, pairwise(blocks), strict=False):
            yield DocumentPlace(slice(*q), slice(*k), position, range(*block))

    @cached_property
    def cu_q(self) -> Tensor:
        """Borders of the documents among the queries, int64 [docs + 1]."""
        if self.placed is not None:
            return self.table[0]
        return one_document(self.num_queries, self.device) if self.cu_seqlens is None else self.cu_seqlens.long()

    @cached_property
    def cu_k(self) -> Tensor:
        """Borders of the documents among the keys, int64 [docs + 1]."""
        if self.placed is not None:
            return self.table[1]
        if self.cu_seqlens is None:
            return one_document(self.num_keys, self.device)
        return self.cu_q if self.cu_seqlens_k is None else self.cu_seqlens_k.long()

    @cached_property
    def q_offset(self) -> Tensor:
        """Position of each document's first query, int64 [docs]."""
        if self.placed is not None:
            return self.table[2, :-1]
        return torch.zeros_like(self.cu_q[1:]) if self.offsets is None else self.offsets.long()

    @cached_property
    def first_block(self) -> Tensor:
        """Number of each document's first block, int64 [docs + 1]."""
        if self.placed is not None:
            return self.table[3]
        blocks = (self.cu_k.diff() + self.block_size - 1) // self.block_size
        return torch.nn.functional.pad(blocks.cumsum(0), (1, 0))

    def query_positions(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Document and position within it of the queries start..stop: two [stop - start]."""
        return find_positions(torch.arange(start, stop, device=self.cu_q.device), self.cu_q, self.q_offset)

    def current_blocks(self, document: Tensor, position: Tensor) -> Tensor:
        """Block that holds each query's own position, -1 where the keys of the document end before it."""
        own = self.first_block[document] + position // self.block_size
        return torch.where(own < self.first_block[document + 1], own, -1)

    def block_spans(self) -> tuple[Tensor, Tensor]:
        """First key and length of every block: two [N]; the unused tail of N has length 0."""
        if self.spans is not None:
            return self.spans[:, 0], self.spans[:, 1]
        index = torch.arange(self.num_blocks, device=self.cu_k.device)
        document = document_of(index, self.first_block).clamp(max=self.cu_k.numel() - 2)
        start = self.cu_k[document] + (index - self.first_block[document]) * self.block_size
        length = (self.cu_k[document + 1] - start).clamp(min=0, max=self.block_size)
        return start, torch.where(index < self.first_block[-1], length, 0)

    def key_positions(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """Block and position within its document of every key: two [S]."""
        document, position = find_positions(torch.arange(num_keys, device=self.cu_k.device), self.cu_k)
        return self.first_block[document] + position // self.block_size, position


def document_of(index: Tensor, borders: Tensor) -> Tensor:
    """The document whose borders [documents + 1] hold each index, `documents` past the last. Empty ones hold none.

    The whole of the borders is searched: inductor takes no slice of them before torch 2.13 (pytorch #182343).
    """
    return torch.searchsorted(borders, index, right=True) - 1


def find_positions(index: Tensor, borders: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Document and position within it of packed tokens, int64 [n] each.

    index: int64 [n]. borders: int64 [documents + 1]. offset: position of each document's first token [documents].
    """
    document = document_of(index, borders)
    position = index - borders[document]
    return document, position if offset is None else position + offset[document]


def packed_positions(total: int, cu_seqlens: Tensor, offset: Tensor | None = None) -> Tensor:
    """Document and position within it of `total` packed tokens: int64 [2, total].

    cu_seqlens: borders, int32 [documents + 1]. offset: position of each document's first token.
    """
    index = torch.arange(total, device=cu_seqlens.device, dtype=torch.int64)
    return torch.stack(find_positions(index, cu_seqlens.long(), offset))


def max_blocks(num_keys: int, block_size: int, documents: int) -> int:
    """Upper bound on the number of blocks of `documents` documents with `num_keys` keys in all."""
    return (num_keys + documents * (block_size - 1)) // block_size


def one_document(tokens: int, device: torch.device) -> Tensor:
    """Borders int64 [2] of a single document, made on the device."""
    return torch.arange(2, device=device) * tokens


def make_layout(
    num_queries: int,
    num_keys: int,
    block_size: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    device: torch.device,
    placed: PlacedBlocks | None = None,
) -> BlockLayout:
    """Build the layout; without cu_seqlens all tokens are one document, without cu_seqlens_k keys lie like queries."""
    documents = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    num_blocks = max_blocks(num_keys, block_size, documents)
    borders = (cu_seqlens, cu_seqlens_k, q_offset)
    return BlockLayout(num_queries, num_keys, block_size, num_blocks, device, *borders, placed=placed)


def make_span_layout(num_queries: int, longest: int, spans: Tensor) -> BlockLayout:
    """Blocks that are spans of keys: int64 [N, 2] start and length, disjoint, at most `longest` keys each.

    Queries have no current block: every column of a selection is attended whole. The Triton kernels give each span's
    keys their gradient in one place, so overlapping spans, which the CPU path would bear, are wrong there.
    """
    return BlockLayout(num_queries, 0, longest, len(spans), spans.device, spans=spans)


class Geometry(NamedTuple):
    """Where queries and keys lie, as the operators take it one by one (their schema: GEOMETRY)."""

    block_size: int  # with spans: of the longest one
    causal: bool
    cu_seqlens: Tensor | None = None  # this and the next two: as in moba_attention
    cu_seqlens_k: Tensor | None = None
    q_offset: Tensor | None = None
    spans: Tensor | None = None  # as in make_span_layout
    table: Tensor | None = None  # this and the next three: those of PlacedBlocks, where it is known
    blocks: Tensor | None = None
    tiles: Tensor | None = None
    borders: Tensor | None = None

    @classmethod
    def of(
        cls,
        block_size: int,
        causal: bool,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None = None,
        q_offset: Tensor | None = None,
        *,
        placed: PlacedBlocks | None,
    ) -> Geometry:
        """Of documents. placed: what is known of their blocks."""
        return cls(block_size, causal, cu_seqlens, cu_seqlens_k, q_offset, None, *(placed or ()))

    @property
    def placed(self) -> PlacedBlocks | None:
        """The last four fields."""
        return None if self.table is None else PlacedBlocks(self.table, self.blocks, self.tiles, self.borders)

    def layout(self, num_queries: int, num_keys: int, device: torch.device) -> BlockLayout:
        """The blocks of these documents, or the given spans."""
        if self.spans is not None:
            return make_span_layout(num_queries, self.block_size, self.spans)
        borders = (self.cu_seqlens, self.cu_seqlens_k, self.q_offset)
        return make_layout(num_queries, num_keys, self.block_size, *borders, device, self.placed)


GEOMETRY = (
    "SymInt block_size, bool causal, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? q_offset, Tensor? spans, "
    "Tensor? table, Tensor? blocks, Tensor? tiles, Tensor? borders"
)


class Problem(NamedTuple):
    """One call: q [T, Hq, D], k and v [S, Hkv, D], block_indices int32 [T, R, columns] or None for full attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor | None
    layout: BlockLayout
    causal: bool

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]
