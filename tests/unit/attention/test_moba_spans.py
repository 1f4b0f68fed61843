"""Attention of queries to given spans of keys (kernels/ops.attend with spans), which context parallelism is made of."""

import pytest
import torch

from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.attention.kernels.layout import Geometry
from tests.reference import Seen, attention_loops

SPANS = [(0, 7), (7, 1), (8, 0), (8, 9), (20, 13), (33, 7)]  # of one key, empty, long, with a gap before 20


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, spans: torch.Tensor
) -> tuple:
    return ops.attend(q, k, v, block_indices, *Geometry(16, False, spans=spans), "auto")[:2]


def keys_of_spans(block_indices: torch.Tensor, spans: list[tuple[int, int]], num_heads: int) -> Seen:
    """The keys of the spans (first key, number) that a query's head chose."""

    def seen(token: int, head: int) -> list[int]:
        chosen = block_indices[token, head * block_indices.shape[1] // num_heads].tolist()
        return sorted({key for c in chosen if c >= 0 for key in range(spans[c][0], sum(spans[c]))})

    return seen


def problem(rows: int, dtype: torch.dtype, spans: list[tuple[int, int]]) -> tuple:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, h, 16, generator=generator, dtype=dtype) for n, h in ((37, 4), (40, 2), (40, 2)))
    block_indices = torch.stack([torch.randperm(len(spans), generator=generator)[:3] for _ in range(37 * rows)])
    block_indices = block_indices.view(37, rows, 3).int()
    block_indices[5] = -1  # no keys at all
    return q, k, v, block_indices, torch.tensor(spans)


@pytest.mark.parametrize("rows", [2, 4])
def test_forward_and_backward_against_loops(rows: int) -> None:
    q, k, v, block_indices, spans = problem(rows, torch.float64, SPANS)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, block_indices, spans)
    expected, expected_lse = attention_loops(*leaves, keys_of_spans(block_indices, SPANS, q.shape[1]))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    for actual, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_parts_of_the_keys_add_up_under_the_common_lse() -> None:
    """Backward of a part of the keys with the output and lse over all keys, the trick of every exchange strategy."""
    q, k, v, _, _ = problem(2, torch.float64, SPANS)
    everything, halves = torch.zeros(37, 2, 1, dtype=torch.int32), [(0, 22), (22, 18)]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, everything, torch.tensor([(0, 40)]))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad)
    with torch.no_grad():
        parts = [
            ops.attend_backward(
                grad,
                None,
                out,
                lse,
                None,
                q,
                k,
                v,
                everything,
                *Geometry(40, False, spans=torch.tensor([half])),
                "auto",
            )
            for half in halves
        ]
    for actual, wanted in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(actual), wanted, rtol=0, atol=1e-12)
