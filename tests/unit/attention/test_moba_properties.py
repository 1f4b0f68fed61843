"""Properties of MoBA that no tolerance can hide: causality, packing, ties, and parts that merge to the whole."""

from __future__ import annotations

import itertools

import pytest
import torch

from neomoba_dist.model.attention.moba import attend, block_means, full_attention, moba_attention, select_blocks
from tests.moba_cases import cu, tensors


@pytest.mark.parametrize("block_size", [4, 16, 200])
def test_future_tokens_change_nothing(block_size: int) -> None:
    q, k, v, _ = tensors(150, (2, 1), 8, torch.float64)
    before = moba_attention(q, k, v, block_size=block_size, top_k=2)
    for border in (1, 17, 80, 149):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[border:] = 7 * x[border:].flip(0) + 1
        after = moba_attention(*changed, block_size=block_size, top_k=2)
        assert (after[:border] - before[:border]).abs().max() <= 1e-13
        assert (after[border:] - before[border:]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_unpacked(causal: bool) -> None:
    borders = [0, 70, 70, 71, 200]
    q, k, v, _ = tensors(200, (4, 2), 8, torch.float32)
    options = {"block_size": 16, "top_k": 3, "causal": causal}
    packed = moba_attention(q, k, v, cu_seqlens=cu(borders), **options)
    for start, stop in itertools.pairwise(borders):
        alone = moba_attention(q[start:stop], k[start:stop], v[start:stop], **options)
        assert torch.allclose(packed[start:stop], alone, atol=1e-6, rtol=0)


def test_permuting_documents_permutes_outputs() -> None:
    q, k, v, _ = tensors(200, (2, 2), 8, torch.float64)
    one, two = slice(0, 130), slice(130, 200)
    out = moba_attention(q, k, v, block_size=16, top_k=2, cu_seqlens=cu([0, 130, 200]))
    q, k, v = (torch.cat([x[two], x[one]]) for x in (q, k, v))
    swapped = moba_attention(q, k, v, block_size=16, top_k=2, cu_seqlens=cu([0, 70, 200]))
    assert torch.allclose(swapped, torch.cat([out[two], out[one]]), atol=1e-13, rtol=0)


def test_change_of_borders_in_place_is_seen() -> None:
    q, k, v, _ = tensors(96, (2, 2), 8, torch.float64)
    borders = cu([0, 40, 96])
    first = moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=borders)
    borders[1] = 60
    second = moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=borders)
    assert torch.equal(second, moba_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=cu([0, 60, 96])))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("causal", [True, False])
def test_sparse_differs_from_full_and_all_blocks_equal_it(causal: bool) -> None:
    q, k, v, grad = tensors(200, (4, 2), 8, torch.float32)
    borders = cu([0, 120, 200])
    full = full_attention(q, k, v, causal=causal, cu_seqlens=borders)
    sparse = moba_attention(q, k, v, block_size=16, top_k=3, causal=causal, cu_seqlens=borders)
    assert (sparse - full).abs().max() > 0.05
    for top_k in (8, 13):  # 8: all blocks of each document, known from the values only; 13: known from the shapes
        every = moba_attention(q, k, v, block_size=16, top_k=top_k, causal=causal, cu_seqlens=borders)
        assert torch.equal(every, full)
        grads = (torch.autograd.grad(x, (q, k, v), grad, retain_graph=True) for x in (every, full))
        assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


def test_top_1_is_the_own_block() -> None:
    q, k, v, _ = tensors(64, (2, 2), 8, torch.float64)
    out = moba_attention(q, k, v, block_size=16, top_k=1)
    blocks = full_attention(q, k, v, causal=True, cu_seqlens=cu([0, 16, 32, 48, 64]))
    assert torch.allclose(out, blocks, atol=1e-14, rtol=0)


def test_ties_go_to_the_higher_block() -> None:
    q = torch.ones(40, 1, 4)
    means = torch.ones(10, 1, 4)
    block_indices = select_blocks(q, means, block_size=4, top_k=3)
    assert block_indices[39, 0].tolist() == [9, 8, 7]
    assert select_blocks(q, means, block_size=4, top_k=3, causal=False)[0, 0].tolist() == [0, 9, 8]
    many = select_blocks(torch.ones(80, 1, 4), torch.ones(20, 1, 4), block_size=4, top_k=19)
    assert many[79, 0].tolist() == list(range(19, 0, -1))
    assert block_indices[5, 0].tolist() == [1, 0, -1]


def test_queries_with_an_offset_equal_the_whole() -> None:
    q, k, v, _ = tensors(100, (4, 2), 8, torch.float64)
    whole, lse = moba_attention(q, k, v, block_size=16, top_k=3, return_lse=True)
    for start, stop in ((0, 30), (30, 47), (47, 48), (48, 100)):
        part, part_lse = moba_attention(
            q[start:stop], k[:stop], v[:stop], block_size=16, top_k=3, q_offset=start, return_lse=True
        )
        assert (part - whole[start:stop]).abs().max() <= 1e-13
        assert (part_lse - lse[start:stop]).abs().max() <= 1e-13


def test_parts_over_split_keys_merge_to_the_whole() -> None:
    """What context parallelism does: each rank attends to the routed blocks that it holds, the parts merge by lse."""
    q, k, v, _ = tensors(128, (4, 2), 8, torch.float64)
    whole, whole_lse = moba_attention(q, k, v, block_size=16, top_k=3, return_lse=True)
    block_indices = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=3)
    parts = []
    for first, last in ((0, 4), (4, 8)):
        here = torch.where((block_indices >= first) & (block_indices < last), block_indices, -1)
        parts.append(attend(q, k, v, here, block_size=16))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts)
    assert (merged - whole).abs().max() <= 1e-13
    assert (lse - whole_lse).abs().max() <= 1e-13
