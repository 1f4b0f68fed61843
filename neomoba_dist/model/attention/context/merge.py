"""The parts that attention over several ranks is made of, each with the backward pass under the common logsumexp.

A part is a set of queries and the keys that they attend to in it: every query's own segment of this rank, causally
masked (LocalAttention); some queries and some consecutive keys (rectangles); MoBA's choice among spans of keys
(SelectedSpans).

Legend: S queries, K keys, Hq/Hkv query and KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.layout import Geometry, PlacedBlocks, make_layout, one_document
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.model.attention.moba import MobaOptions
from neomoba_dist.parallel.context_split import ContextSplit, Pieces, Segment, pieces, segments
from neomoba_dist.parallel.mesh import Mesh

Grads = tuple[Tensor, Tensor, Tensor]
Result = TypeVar("Result")
Rest = ParamSpec("Rest")


@dataclass(frozen=True)
class Exchange:
    """What layers of one kind have to solve for one micro-batch: documents, who holds which tokens, what is attended.

    borders: the values of cu_seqlens. moba: None for full attention. placed: the blocks of all tokens, where known.
    """

    cu_seqlens: Tensor
    borders: list[int]
    split: ContextSplit
    mesh: Mesh
    axis: str
    causal: bool
    moba: MobaOptions | None
    placed: PlacedBlocks | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(
        self, make: Callable[Concatenate[Exchange, Rest], Result], *args: Rest.args, **options: Rest.kwargs
    ) -> Result:
        """make(self, *args): computed for the first layer that asks, and kept for the others."""
        key = (make, args, tuple(options.items()))
        if key not in self._made:
            self._made[key] = make(self, *args, **options)
        return self._made[key]

    @property
    def rank(self) -> int:
        """Which of the split's ranks this process is."""
        return self.mesh[self.axis].index

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.cu_seqlens.device

    @cached_property
    def segments(self) -> list[Segment]:
        """The parts of documents that this rank holds."""
        return segments(self.split, self.rank, self.borders)

    @cached_property
    def pieces(self) -> Pieces:
        """All blocks, cut where they change ranks; on the host."""
        assert self.moba is not None
        return pieces(self.split, self.borders, self.moba.block_size)


class Exchanges:
    """The exchanges of all layers for one micro-batch. placed: the blocks of all its tokens, where known."""

    def __init__(self, cu_seqlens: Tensor, mesh: Mesh, causal: bool, placed: PlacedBlocks | None = None) -> None:
        self.cu_seqlens, self.mesh, self.causal, self.placed = cu_seqlens, mesh, causal, placed
        self._made: dict[tuple[ContextSplit, str, MobaOptions | None], Exchange] = {}

    @cached_property
    def borders(self) -> list[int]:
        """Sizes of messages and parts follow from them, so the host must know them; read once."""
        return self.cu_seqlens.tolist()

    def of(self, split: ContextSplit, axis: str, moba: MobaOptions | None) -> Exchange:
        """That over the ranks of `axis`, among which the tokens lie as `split` says."""
        key = (split, axis, moba)
        if key not in self._made:
            self._made[key] = Exchange(
                self.cu_seqlens, self.borders, split, self.mesh, axis, self.causal, moba, self.placed
            )
        return self._made[key]


class Merged:
    """The sum of parts: out [S, Hq, D] and lse [S, Hq], in the dtype of the scores."""

    def __init__(self, q: Tensor) -> None:
        dtype = score_dtype(q.dtype)
        self.out, self.lse = torch.zeros_like(q, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)

    def add(self, rows: slice | Tensor | tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
        """Merge what some queries (each at most once) found among further keys."""
        self.out[rows], self.lse[rows] = update_out_and_lse(self.out[rows], self.lse[rows], out, lse)


def update_out_and_lse(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from those over each; lse -inf stands for no keys."""
    merged = torch.logaddexp(lse, new_lse)
    base = merged.masked_fill(merged == -torch.inf, 0.0)
    weight, new_weight = (lse - base).exp()[..., None], (new_lse - base).exp()[..., None]
    return out * weight + new_out * new_weight, merged


class LocalAttention:
    """Every query with the keys of its own segment: consecutive segments of `lengths` tokens, on this rank."""

    def __init__(self, lengths: Sequence[int], causal: bool, device: torch.device) -> None:
        self.causal, self.longest = causal, max(lengths)
        self.cu = torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0))
        self.cu = self.cu.to(device, torch.int32)
        self._block_indices: dict[int, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self.block_indices(k), *self._geometry(), "auto")[:2]

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Grads:
        return ops.attend_backward(
            grad, None, out, lse, None, q, k, v, self.block_indices(k), *self._geometry(), "auto"
        )

    def _geometry(self) -> Geometry:
        return Geometry(self.longest, self.causal, self.cu)

    def block_indices(self, k: Tensor) -> Tensor | None:
        """The one block of every query, by KV head; None on the CPU, where that is full attention."""
        if k.device.type == "cpu":
            return None
        heads = k.shape[1]
        if heads not in self._block_indices:
            layout = make_layout(len(k), len(k), self.longest, self.cu, None, None, k.device)
            own = layout.current_blocks(*layout.query_positions(0, len(k)))
            self._block_indices[heads] = own.int()[:, None, None].expand(-1, heads, 1).contiguous()
        return self._block_indices[heads]


class SelectedSpans:
    """Queries with the spans that they chose.

    block_indices: int32 [S, R, columns], numbers of spans. spans: int64 [N, 2], start and length, at most `longest`.
    """

    def __init__(self, block_indices: Tensor, spans: Tensor, longest: int) -> None:
        self.block_indices, self.spans, self.longest = block_indices, spans, longest

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self.block_indices, *self._geometry(), "auto")[:2]

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None = None
    ) -> Grads:
        return ops.attend_backward(
            grad, grad_lse, out, lse, None, q, k, v, self.block_indices, *self._geometry(), "auto"
        )

    def _geometry(self) -> Geometry:
        return Geometry(self.longest, False, spans=self.spans)


Rectangle = tuple[slice, slice]  # local queries, keys


def rectangle_spans(q: Tensor, k: Tensor) -> SelectedSpans:
    """All of q with all of k."""
    block_indices = torch.zeros(len(q), k.shape[1], 1, dtype=torch.int32, device=q.device)
    return SelectedSpans(block_indices, one_document(len(k), q.device)[None], len(k))


def add_rectangles(merged: Merged, rectangles: Sequence[Rectangle], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward of rectangles."""
    for rows, keys in rectangles:
        merged.add(rows, *rectangle_spans(q[rows], k[keys]).forward(q[rows], k[keys], v[keys]))


def zeros_like_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums to add gradients to, in the dtype of the scores."""
    return tuple(torch.zeros_like(x, dtype=score_dtype(x.dtype)) for x in tensors)


def add_rectangle_gradients(
    totals: Sequence[Tensor],
    rectangles: Sequence[Rectangle],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> None:
    """Backward of rectangles, added to dq [S, Hq, D], dk and dv [K, Hkv, D]."""
    dq, dk, dv = totals
    for rows, keys in rectangles:
        rectangle = rectangle_spans(q[rows], k[keys])
        parts = rectangle.backward(q[rows], k[keys], v[keys], out[rows], lse[rows], grad[rows])
        for total, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            total[where] += part
