"""The parts that attention over several ranks is made of, each with the backward pass under the common logsumexp.

A part is a set of queries and the keys that they see in it: squares (every query's own stretch of tokens, causally
masked), rectangles (some queries, some consecutive keys) and routes (MoBA's choice among spans of keys).

Legend: S queries, K keys, Hq/Hkv query and KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.layout import make_layout
from neomoba_dist.model.attention.kernels.select import score_dtype
from neomoba_dist.parallel.context_split import ContextSplit, Pieces, Segment, pieces, segments
from neomoba_dist.parallel.mesh import Mesh

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Exchange:
    """One layer's problem: documents, who holds which tokens, and what is attended. moba: (block size, top k)."""

    cu_seqlens: Tensor
    borders: list[int]
    split: ContextSplit
    mesh: Mesh
    axis: str
    causal: bool
    moba: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        split: ContextSplit,
        mesh: Mesh,
        axis: str,
        causal: bool,
        moba: tuple[int, int] | None,
    ) -> Exchange:
        """Reads the borders: sizes of messages and parts follow from them, so the host must know them."""
        return cls(cu_seqlens, cu_seqlens.tolist(), split, mesh, axis, causal, moba)

    @property
    def rank(self) -> int:
        """Which of the split's ranks this process is."""
        return self.mesh[self.axis].index

    def segments(self) -> list[Segment]:
        """The stretches of documents that this rank holds."""
        return segments(self.split, self.rank, self.borders)

    def pieces(self) -> Pieces:
        """All blocks, cut where they change ranks."""
        assert self.moba is not None
        return pieces(self.split, self.borders, self.moba[0])


class Merged:
    """The sum of parts: out [S, Hq, D] and lse [S, Hq], in the dtype of the scores."""

    def __init__(self, q: Tensor) -> None:
        dtype = score_dtype(q.dtype)
        self.out, self.lse = torch.zeros_like(q, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)

    def add(self, rows: slice | Tensor | tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
        """Merge what some queries (each at most once) found among further keys."""
        before = self.lse[rows]
        merged = torch.logaddexp(before, lse)
        base = merged.masked_fill(merged == -torch.inf, 0.0)
        old, new = (before - base).exp()[..., None], (lse - base).exp()[..., None]
        self.out[rows] = self.out[rows] * old + out * new
        self.lse[rows] = merged


class Squares:
    """Every query with the keys of its own stretch: consecutive stretches of `lengths` tokens, on this rank."""

    def __init__(self, lengths: Sequence[int], causal: bool, device: torch.device) -> None:
        self.causal, self.longest = causal, max(lengths)
        self.cu = torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0))
        self.cu = self.cu.to(device, torch.int32)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self._routes(k), self.longest, self.causal, self.cu, None, None, None, "auto")

    def backward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Grads:
        routes = self._routes(k)
        return ops.attend_backward(
            grad, None, q, k, v, routes, out, lse, self.longest, self.causal, self.cu, None, None, None, "auto"
        )

    def _routes(self, k: Tensor) -> Tensor | None:
        if k.device.type == "cpu":
            return None
        layout = make_layout(len(k), len(k), self.longest, self.cu, None, None, k.device)
        own = layout.own_blocks(*layout.query_places(0, len(k)))
        return own.int()[:, None, None].expand(-1, k.shape[1], 1).contiguous()


class Routes:
    """Queries with the spans that they chose: routes int32 [S, R, columns], spans int64 [N, 2] (start, length)."""

    def __init__(self, routes: Tensor, spans: Tensor, longest: int) -> None:
        self.routes, self.spans, self.longest = routes, spans, longest

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, self.routes, self.longest, False, None, None, None, self.spans, "auto")

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None = None
    ) -> Grads:
        return ops.attend_backward(
            grad, grad_lse, q, k, v, self.routes, out, lse, self.longest, False, None, None, None, self.spans, "auto"
        )


Rectangle = tuple[slice, slice]  # local queries, keys


def rectangle_routes(q: Tensor, k: Tensor) -> Routes:
    """All of q with all of k."""
    routes = torch.zeros(len(q), k.shape[1], 1, dtype=torch.int32, device=q.device)
    return Routes(routes, torch.tensor([(0, len(k))], device=q.device), len(k))


def add_rectangles(merged: Merged, rectangles: Sequence[Rectangle], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forward of rectangles."""
    for rows, keys in rectangles:
        merged.add(rows, *rectangle_routes(q[rows], k[keys]).forward(q[rows], k[keys], v[keys]))


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
        routes = rectangle_routes(q[rows], k[keys])
        parts = routes.backward(q[rows], k[keys], v[keys], out[rows], lse[rows], grad[rows])
        for total, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            total[where] += part
