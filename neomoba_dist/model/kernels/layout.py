"""Where the blocks of packed documents lie: one small description shared by routing and every attention kernel.

MoBA counts its blocks from the start of each document; the last block of a document may be short. Blocks of all
documents are numbered consecutively. The number of blocks depends on the values in `cu_seqlens`, so every array
over blocks is sized by an upper bound that only depends on shapes: nothing here copies a value from the device.

Legend: T queries, S keys, N blocks (upper bound), docs documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of all documents. Tensors are int64 on the device of the queries."""

    num_queries: int  # T
    block_size: int
    num_blocks: int  # N, static upper bound
    cu_q: Tensor  # [docs + 1] borders of the documents among the queries
    cu_k: Tensor  # [docs + 1] borders of the documents among the keys
    q_offset: Tensor  # [docs] position of each document's first query
    first_block: Tensor  # [docs + 1] number of each document's first block
    spans: Tensor | None = None  # [N, 2] start and length of every block, where blocks are given and not counted

    def query_places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Document and position within it of the queries start..stop: two [stop - start]."""
        index = torch.arange(start, stop, device=self.cu_q.device)
        document = torch.searchsorted(self.cu_q[1:], index, right=True)
        position = index - self.cu_q[document] + self.q_offset[document]
        return document, position

    def own_blocks(self, document: Tensor, position: Tensor) -> Tensor:
        """Block that holds each query's own position, -1 where the keys of the document end before it."""
        own = self.first_block[document] + position // self.block_size
        return torch.where(own < self.first_block[document + 1], own, -1)

    def block_spans(self) -> tuple[Tensor, Tensor]:
        """First key and length of every block: two [N]; the unused tail of N has length 0."""
        if self.spans is not None:
            return self.spans[:, 0], self.spans[:, 1]
        index = torch.arange(self.num_blocks, device=self.cu_k.device)
        document = torch.searchsorted(self.first_block[1:], index, right=True).clamp(max=self.cu_k.numel() - 2)
        start = self.cu_k[document] + (index - self.first_block[document]) * self.block_size
        length = (self.cu_k[document + 1] - start).clamp(min=0, max=self.block_size)
        return start, torch.where(index < self.first_block[-1], length, 0)

    def own_keys(self, causal: bool) -> tuple[Tensor, ...]:
        """Keys first..last of its own block that each query sees, int32: two [T]; empty where there is no own block."""
        if self.spans is not None:
            return (self.spans.new_zeros(self.num_queries, dtype=torch.int32),) * 2
        document, position = self.query_places(0, self.num_queries)
        start = self.cu_k[document] + position // self.block_size * self.block_size
        stop = torch.minimum(start + self.block_size, self.cu_k[document + 1])
        if causal:
            stop = torch.minimum(stop, self.cu_k[document] + position + 1)
        return start.int(), torch.maximum(start, stop).int()

    def own_queries(self) -> tuple[Tensor, ...]:
        """Queries first..last whose own block is each block, and the first one's place in it, int32: three [N]."""
        if self.spans is not None:
            return (self.spans.new_zeros(self.num_blocks, dtype=torch.int32),) * 3
        index = torch.arange(self.num_blocks, device=self.cu_k.device)
        document = torch.searchsorted(self.first_block[1:], index, right=True).clamp(max=self.cu_k.numel() - 2)
        position = (index - self.first_block[document]) * self.block_size
        tokens = self.cu_q[document + 1] - self.cu_q[document]
        place = (self.q_offset[document] - position).clamp(min=0)
        low = torch.minimum((position - self.q_offset[document]).clamp(min=0), tokens)
        high = torch.minimum((position + self.block_size - self.q_offset[document]).clamp(min=0), tokens)
        high = torch.where(index < self.first_block[-1], high, low)
        return (self.cu_q[document] + low).int(), (self.cu_q[document] + high).int(), place.int()

    def key_places(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """Block and position within its document of every key: two [S]."""
        index = torch.arange(num_keys, device=self.cu_k.device)
        document = torch.searchsorted(self.cu_k[1:], index, right=True)
        position = index - self.cu_k[document]
        return self.first_block[document] + position // self.block_size, position


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
) -> BlockLayout:
    """Build the layout; without cu_seqlens all tokens are one document, without cu_seqlens_k keys lie like queries."""
    if cu_seqlens is None:
        cu_q, cu_k = one_document(num_queries, device), one_document(num_keys, device)
    else:
        cu_q = cu_seqlens.long()
        cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.long()
    documents = cu_q.numel() - 1
    offset = torch.zeros(documents, dtype=torch.int64, device=device) if q_offset is None else q_offset.long()
    first_block = torch.nn.functional.pad(((cu_k.diff() + block_size - 1) // block_size).cumsum(0), (1, 0))
    num_blocks = max_blocks(num_keys, block_size, documents)
    return BlockLayout(num_queries, block_size, num_blocks, cu_q, cu_k, offset, first_block)


def make_span_layout(num_queries: int, longest: int, spans: Tensor) -> BlockLayout:
    """Blocks that are spans of keys: int64 [N, 2] start and length, disjoint, at most `longest` keys each.

    Queries have no own block: every column of a routing is attended whole. The Triton kernels give each span's keys
    their gradient in one place, so overlapping spans, which the CPU path would bear, are wrong there.
    """
    nothing = torch.zeros(2, dtype=torch.int64, device=spans.device)
    return BlockLayout(num_queries, longest, len(spans), nothing, nothing, nothing[:1], nothing, spans)


def check_cu_seqlens(cu_seqlens: Tensor, total: int, name: str = "cu_seqlens") -> None:
    """Check document borders on the host, once, where a batch is built.

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
