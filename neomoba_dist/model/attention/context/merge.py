"""The parts that attention over several ranks is made of, each with the backward pass under the common logsumexp.

A part is a set of queries and the keys that they attend to in it: every query's own segment of this rank, causally
masked (LocalAttention); some queries and some consecutive keys (rectangles); MoBA's choice among spans of keys
(SelectedSpans).

Legend: S queries, K keys, Hq/Hkv query and KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.layout import Places, make_layout
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.model.attention.moba import MobaOptions
from neomoba_dist.parallel.context_split import ContextSplit, Pieces, Segment, pieces, segments
from neomoba_dist.parallel.mesh import Mesh

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Exchange:
    """One layer's problem: documents, who holds which tokens, and what is attended. moba: None for full attention."""

    cu_seqlens: Tensor
    borders: list[int]
    split: ContextSplit
    mesh: Mesh
    axis: str
    causal: bool
    moba: MobaOptions | None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        split: ContextSplit,
        mesh: Mesh,
        axis: str,
        causal: bool,
        moba: MobaOptions | None,
    ) -> Exchange:
        """Reads the borders: sizes of messages and parts follow from them, so the host must know them."""
        return cls(cu_seqlens, cu_seqlens.tolist(), split, mesh, axis, causal, moba)

    @property
    def rank(self) -> int:
        """Which of the split's ranks this process is."""
        return self.mesh[self.axis].index

    def segments(self) -> list[Segment]:
        """The parts of documents that this rank holds."""
        return segments(self.split, self.rank, self.borders)

    def pieces(self) -> Pieces:
        """All blocks, cut where they change ranks."""
        assert self.moba is not None
        return pieces(self.split, self.borders, self.moba.block_size)


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self._block_indices(k), *self._places(), "auto")

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Grads:
        return ops.attend_backward(grad, None, out, lse, q, k, v, self._block_indices(k), *self._places(), "auto")

    def _places(self) -> Places:
        return Places(self.longest, self.causal, self.cu)

    def _block_indices(self, k: Tensor) -> Tensor | None:
        if k.device.type == "cpu":
            return None
        layout = make_layout(len(k), len(k), self.longest, self.cu, None, None, k.device)
        own = layout.current_blocks(*layout.query_places(0, len(k)))
        return own.int()[:, None, None].expand(-1, k.shape[1], 1).contiguous()


class SelectedSpans:
    """Queries with the spans that they chose.

    block_indices: int32 [S, R, columns], numbers of spans. spans: int64 [N, 2], start and length, at most `longest`.
    """

    def __init__(self, block_indices: Tensor, spans: Tensor, longest: int) -> None:
        self.block_indices, self.spans, self.longest = block_indices, spans, longest

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self.block_indices, *self._places(), "auto")

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None = None
    ) -> Grads:
        return ops.attend_backward(grad, grad_lse, out, lse, q, k, v, self.block_indices, *self._places(), "auto")

    def _places(self) -> Places:
        return Places(self.longest, False, spans=self.spans)


Rectangle = tuple[slice, slice]  # local queries, keys


def rectangle_spans(q: Tensor, k: Tensor) -> SelectedSpans:
    """All of q with all of k."""
    block_indices = torch.zeros(len(q), k.shape[1], 1, dtype=torch.int32, device=q.device)
    return SelectedSpans(block_indices, torch.tensor([(0, len(k))], device=q.device), len(k))


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
