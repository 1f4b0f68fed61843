"""The Triton kernels in Triton's interpreter. Run by test_moba_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neomoba_dist.model.attention.kernels import groups, ops
from neomoba_dist.model.attention.kernels.cpu.select import block_means_cpu, select_blocks_cpu
from neomoba_dist.model.attention.kernels.layout import BlockLayout, Geometry, Problem, make_layout
from neomoba_dist.model.attention.kernels.select import best_blocks
from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward
from neomoba_dist.model.attention.kernels.triton.common import Tiles
from neomoba_dist.model.attention.kernels.triton.forward import attend_triton, whole_tiles
from neomoba_dist.model.attention.kernels.triton.index import build_index, index_shape
from neomoba_dist.model.attention.kernels.triton.select import block_means_triton, select_blocks_triton
from neomoba_dist.model.attention.moba import attend, block_means, moba_attention, place_blocks, select_blocks

PACKED = [0, 0, 20, 21, 64]


def draw(tokens: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v that require a gradient, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads[0], head_dim), *[(keys, heads[1], head_dim)] * 2, (tokens, heads[0], head_dim)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(i < 3) for i, s in enumerate(shapes)]


def cu(borders: list[int] | None) -> Tensor | None:
    return None if borders is None else torch.tensor(borders, dtype=torch.int32)


def assert_equals_reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any) -> None:
    results = []
    for impl in ("triton", "reference"):
        out, lse = moba_attention(q, k, v, impl=impl, return_lse=True, **options)
        loss = (out * grad).sum() + lse.sin().sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-2
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= tolerance


@pytest.mark.usefixtures("short_index_tiles")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "block_size", "top_k"), [((4, 2), 16, 3), ((2, 2), 7, 2), ((3, 1), 32, 1)])
@pytest.mark.parametrize("borders", [None, PACKED])
def test_grid(borders: list[int] | None, heads: tuple[int, int], block_size: int, top_k: int, causal: bool) -> None:
    options = {"block_size": block_size, "top_k": top_k, "causal": causal, "cu_seqlens": cu(borders)}
    assert_equals_reference(*draw(64, 64, heads, 16, torch.float32), **options)


@pytest.mark.parametrize("head_dim", [12, 96, 128])
def test_head_dims(head_dim: int) -> None:
    assert_equals_reference(*draw(40, 40, (2, 1), head_dim, torch.float32), block_size=16, top_k=3)


def test_half_precision() -> None:
    assert_equals_reference(*draw(80, 80, (2, 1), 64, torch.float16), block_size=16, top_k=3)


@pytest.mark.usefixtures("short_index_tiles")
def test_many_blocks_and_group_gate() -> None:
    assert_equals_reference(*draw(48, 48, (4, 2), 16, torch.float32), block_size=8, top_k=4, gate="kv_group")


@pytest.mark.usefixtures("short_index_tiles")
@pytest.mark.parametrize("causal", [True, False])
def test_offsets_and_own_keys(causal: bool) -> None:
    options = {"cu_seqlens": cu([0, 10, 40]), "cu_seqlens_k": cu([0, 20, 60]), "q_offset": torch.tensor([10, 5])}
    assert_equals_reference(*draw(40, 60, (2, 1), 16, torch.float32), block_size=8, top_k=2, causal=causal, **options)


def test_longer_with_several_tiles() -> None:
    assert_equals_reference(*draw(512, 512, (1, 1), 64, torch.float32), block_size=128, top_k=2)


def test_parts_of_the_routes_and_queries_without_keys() -> None:
    q, k, v, _ = draw(64, 64, (2, 1), 16, torch.float32)
    block_indices = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=2)
    here = torch.where(block_indices == 1, block_indices, -1)
    (out, lse), (want, want_lse) = (attend(q, k, v, here, block_size=16, impl=i) for i in ("triton", "reference"))
    assert (out - want).abs().max() <= 1e-5
    assert torch.equal(lse.isinf(), want_lse.isinf())
    assert lse.isinf().any()


def test_damage_stays_in_its_document() -> None:
    """Both documents fit one tile of queries; what is not finite in one leaves results and gradients of the other."""
    q, k, v, grad = draw(24, 24, (1, 1), 16, torch.float32)
    runs = []
    for name, value in (("k", 0.0), ("k", torch.nan), ("v", torch.inf)):
        leaves = {"q": q, "k": k, "v": v}
        if value:
            leaves[name] = leaves[name].detach().clone().index_fill_(0, torch.tensor([15]), value).requires_grad_()
        out = moba_attention(**leaves, block_size=8, top_k=2, cu_seqlens=cu([0, 12, 24]), impl="triton")
        runs.append([out, *torch.autograd.grad(out, tuple(leaves.values()), grad)])
    for run in runs[1:]:
        assert not run[0][15:].isfinite().any()
        for got, want in zip(run, runs[0], strict=True):
            assert torch.equal(got[:12], want[:12])


def layouts() -> list[tuple[int, int, BlockLayout]]:
    """(queries, keys, layout) with one document, with several, and with an offset, for blocks of 8."""
    found = []
    for borders, keys, offset in ((None, None, None), (PACKED, None, None), ([0, 30, 40], [0, 60, 100], [10, 15])):
        tokens = 64 if borders is None else borders[-1]
        num_keys = tokens if keys is None else keys[-1]
        at = None if offset is None else torch.tensor(offset)
        found.append(
            (tokens, num_keys, make_layout(tokens, num_keys, 8, cu(borders), cu(keys), at, torch.device("cpu")))
        )
    return found


@pytest.mark.parametrize("pooling", ["mean", "max", "minmax", "representative"])
def test_pooling_and_gate(pooling: str) -> None:
    cases = layouts() if pooling == "mean" else layouts()[1:2]
    for (tokens, keys, layout), causal, gate in itertools.product(cases, (True, False), ("per_head", "kv_group")):
        q, k, *_ = (x.detach() for x in draw(tokens, keys, (4, 2), 12, torch.float32))
        means = block_means_cpu(k, layout, pooling)
        assert (block_means_triton(k, layout, pooling) - means).abs().max() <= 1e-6
        options = {"top_k": 4, "causal": causal, "gate": gate, "pooling": pooling}
        got = select_blocks_triton(q, means, layout, tiles=Tiles(32, 16, 4, 1), **options)
        assert torch.equal(got, select_blocks_cpu(q, means, layout, **options))


def test_gate_ties_and_not_a_number() -> None:
    layout = make_layout(40, 40, 4, None, None, None, torch.device("cpu"))
    q, means = torch.ones(40, 1, 4), torch.ones(10, 1, 4)
    means[2] = torch.nan
    means[4] = -torch.inf
    means[5] = -0.0
    means[6] = 0.0
    options = {"top_k": 4, "causal": True, "gate": "per_head", "pooling": "mean"}
    got = select_blocks_triton(q, means, layout, tiles=Tiles(16, 16, 4, 1), **options)
    assert got[39, 0].tolist() == [9, 2, 8, 7]
    scores = torch.einsum("thd,nhd->thn", q, means)[:, 0]
    past = torch.arange(10) < torch.arange(40)[:, None] // 4
    assert torch.equal(got[:, 0, 1:], best_blocks(scores, past, 3))


def test_pooling_keeps_what_is_not_a_number() -> None:
    k = draw(1, 16, (1, 1), 12, torch.float32)[1].detach()
    k[3, 0, 5] = torch.nan
    layout = make_layout(0, 16, 8, None, None, None, torch.device("cpu"))
    for pooling in ("mean", "max", "minmax"):
        got, want = block_means_triton(k, layout, pooling), block_means_cpu(k, layout, pooling)
        assert torch.allclose(got, want, atol=1e-6, rtol=0, equal_nan=True)
        assert got.isnan().any()


def test_index_holds_each_choice_once() -> None:
    generator = torch.Generator().manual_seed(0)
    block_indices = (
        torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(700 * 2)]).view(700, 2, 4).int()
    )
    block_indices[torch.rand(block_indices.shape, generator=generator) < 0.3] = -1
    blocks = torch.tensor([(100 * n, 60 + n, 0, 0, 0) for n in range(6)], dtype=torch.int32)
    index = index_shape(block_indices, 6, 16).view(build_index(block_indices, blocks, list_tile=16, query_tile=16))
    for head in range(2):
        tiles = []
        for block in range(6):
            start, stop = index.first[head, block : block + 2].tolist()
            want = (block_indices[:, head, 1:] == block).any(1).nonzero()[:, 0]
            assert torch.equal(index.queries[head, start:stop].long().sort().values, want)
            keys = (100 * block, 101 * block + 60)
            tiles += [[*keys, place, min(place + 16, stop)] for place in range(start, stop, 16)]
        assert index.tiles[head, : len(tiles)].tolist() == tiles
        assert (index.tiles[head, len(tiles) :] == 0).all()
        for column in range(3):
            slots, chosen = index.slots[:, head, column], block_indices[:, head, column + 1]
            assert torch.equal(slots < 0, chosen < 0)
            there = slots >= 0
            assert torch.equal(index.queries[head, slots[there].long()].long(), there.nonzero()[:, 0])
            first = index.first[head, chosen[there].long()]
            assert (slots[there] >= first).all()
            assert (slots[there] < index.first[head, chosen[there].long() + 1]).all()


def test_tiles_do_not_matter_and_bits_repeat() -> None:
    q, k, v, _ = (x.detach() for x in draw(64, 64, (2, 1), 16, torch.float32))
    layout = make_layout(64, 64, 16, None, None, None, q.device)
    block_indices = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=3)
    out, lse, _ = attend_triton(Problem(q, k, v, block_indices, layout, True), Tiles(16, 16, 4, 1))
    again, *_ = attend_triton(Problem(q, k, v, block_indices, layout, True), Tiles(16, 16, 4, 1))
    other, other_lse, _ = attend_triton(Problem(q, k, v, block_indices, layout, True), Tiles(32, 32, 4, 1))
    assert torch.equal(out, again)
    assert (out - other).abs().max() <= 1e-6
    assert (lse - other_lse).abs().max() <= 1e-6


@pytest.mark.parametrize("damaged", [True, False])
def test_tiles_by_descriptors_change_no_bit(damaged: bool) -> None:
    """Whole tiles of keys and a rest, of k and v alone or as slices of one tensor. What is not finite in the keys that
    follow a document reaches none of its queries. Where head_dim or strides do not allow it, loads go by pointers."""
    q, k, v, _ = (x.detach() for x in draw(96, 96, (4, 2), 16, torch.float32))
    if damaged:
        k, v = torch.cat((k, v), 1).split(2, 1)
        k[44] = v[44] = torch.nan
    options: dict[str, Any] = {"block_size": 24, "cu_seqlens": cu([0, 44, 96])}
    selected = select_blocks(q, block_means(k, **options), top_k=3, causal=False, **options)
    assert (selected[:24, :, 1] == 1).all()
    layout = make_layout(96, 96, 24, options["cu_seqlens"], None, None, q.device)
    problem, plain = Problem(q, k, v, selected, layout, False), Tiles(32, 16, 4, 1)
    by_descriptors = plain._replace(descriptors=True)
    assert whole_tiles(k, plain) is None
    assert whole_tiles(k, by_descriptors) is not None
    assert whole_tiles(torch.empty(40, 2, 18)[..., :16], by_descriptors) is None
    assert whole_tiles(torch.empty(40, 2, 12), by_descriptors) is None
    (want, want_lse, _), (got, got_lse, _) = (attend_triton(problem, tiles) for tiles in (plain, by_descriptors))
    assert want[:44].isfinite().all()
    assert want[44:].isfinite().all() != damaged
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(got_lse.nan_to_num(), want_lse.nan_to_num())


@pytest.mark.parametrize("gate", ["per_head", "kv_group"])
def test_heads_in_groups_change_no_bit(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and one at a time."""
    q, k, v, grad = (x.detach() for x in draw(64, 64, (4, 2), 16, torch.float32))
    layout = make_layout(64, 64, 16, None, None, None, q.device)
    selected = select_blocks(q, block_means(k, block_size=16), block_size=16, top_k=3, gate=gate)
    problem, runs = Problem(q, k, v, selected, layout, True), []
    part_of_a_head = 64 * 2 * (16 * 4 + 4)
    for together in (4, 1):
        monkeypatch.setattr(groups, "LEAST_LIMIT", together * part_of_a_head)
        monkeypatch.setattr(groups, "LIMIT_PER_ELEMENT", 0)
        assert groups.head_groups(q, 4, part_of_a_head) == 4 // together
        out, lse, index = attend_triton(problem)
        runs.append((out, lse, *attend_triton_backward(problem, out, lse, grad, None, index)))
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))
    assert all(x.any() for x in runs[0])


@pytest.mark.parametrize(("heads", "gate"), [((4, 2), "per_head"), ((4, 2), "kv_group"), ((1, 1), "per_head")])
def test_long_lists_are_split(heads: tuple[int, int], gate: str) -> None:
    """Everybody chooses block 0, some also block 2: lists in chunks give what whole ones give, and bits repeat."""
    q, k, v, grad = (x.detach() for x in draw(64, 64, heads, 16, torch.float32))
    layout = make_layout(64, 64, 16, None, None, None, q.device)
    options: dict[str, Any] = {"block_size": 16, "top_k": 3, "gate": gate}
    block_indices = select_blocks(q, block_means(k, block_size=16), **options)
    block_indices[16:, :, 1] = 0
    block_indices[:, :, 2] = -1
    block_indices[60:, 0, 2] = 2
    problem = Problem(q, k, v, block_indices, layout, True)
    out, lse, index = attend_triton(problem)
    runs = [attend_triton_backward(problem, out, lse, grad, None, index, long_list=n) for n in (23, 23, None)]
    exact = [x.requires_grad_() for x in (q, k, v)]
    want = attend(*exact, block_indices, block_size=16, impl="reference")[0]
    expected = torch.autograd.grad(want, exact, grad)
    for run in runs:
        for got, wanted in zip(run, expected, strict=True):
            assert (got - wanted).abs().max() <= 1e-5
    assert all(torch.equal(got, again) for got, again in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][1], runs[2][1])  # sums of chunks round otherwise: they were made


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "per_head"), (3, "kv_group")])
def test_known_places_and_a_kept_index_change_no_bit(top_k: int, gate: str, causal: bool) -> None:
    q, k, v, grad = draw(64, 64, (4, 2), 16, torch.float32)
    borders = cu(PACKED)
    options: dict[str, Any] = {"block_size": 8, "top_k": top_k, "causal": causal, "gate": gate, "cu_seqlens": borders}
    placed = place_blocks(cu(PACKED), 64, block_size=8, head_dim=16, dtype=torch.float32, impl="triton")
    runs = []
    for known in (None, placed):
        out = moba_attention(q, k, v, impl="triton", placed=known, **options)
        runs.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    selected = select_blocks(q, block_means(k, block_size=8, cu_seqlens=borders), **options)
    operands = (q, k, v, selected, *Geometry(8, causal, borders), "triton")
    out, lse, index = ops.attend(*operands)
    for kept in (None, index):
        runs.append([out, *ops.attend_backward(grad, None, out, lse, kept, *operands)])
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


def test_places_for_other_tiles_are_refused() -> None:
    q, k, v, _ = draw(256, 256, (1, 1), 16, torch.float16)
    borders = cu([0, 256])
    assert borders is not None
    placed = place_blocks(borders, 256, block_size=128, head_dim=16, dtype=torch.float32, impl="triton")
    with pytest.raises(AssertionError, match="placed for tiles of another size"):
        moba_attention(q, k, v, block_size=128, top_k=1, cu_seqlens=borders, impl="triton", placed=placed)


def test_shapes_are_those_that_compiled_graphs_expect() -> None:
    """Also of the index, with counted blocks, with given spans, and without queries."""
    q, k, v, _ = (x.detach() for x in draw(64, 64, (4, 2), 16, torch.float32))
    selected = select_blocks(q, block_means(k, block_size=8), block_size=8, top_k=3)
    spans = Geometry(20, False, spans=torch.tensor([(0, 7), (7, 20)]))
    nothing = Geometry(8, True, cu([0, 0]), cu([0, 64]))
    for operands in (
        (q, k, v, selected, *Geometry(8, True), "triton"),
        (q, k, v, selected.clamp(max=1), *spans, "triton"),
        (q[:0], k, v, selected[:0], *nothing, "triton"),
    ):
        with FakeTensorMode() as fake:
            promised = ops.attend(*(fake.from_tensor(x) if isinstance(x, Tensor) else x for x in operands))
        assert [x.shape for x in ops.attend(*operands)] == [x.shape for x in promised]


@pytest.mark.parametrize("rows", [1, 2])
def test_spans_of_keys(rows: int) -> None:
    """Queries to given, disjoint spans of keys: one of one key, one empty, one longer than a tile, keys in none."""
    spans = torch.tensor([(0, 7), (7, 1), (8, 0), (10, 20), (30, 33)])
    q, k, v, grad = draw(37, 64, (2, 1), 16, torch.float32)
    generator = torch.Generator().manual_seed(1)
    block_indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(37 * rows)])
    block_indices = block_indices.view(37, rows, 3).int()
    block_indices[5] = -1
    results = []
    for impl in ("triton", "torch"):
        out, lse, _ = ops.attend(q, k, v, block_indices, *Geometry(33, False, spans=spans), impl)
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        results.append((out, lse.exp(), *torch.autograd.grad((out * grad).sum() + seen.sin().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.detach().abs().max()))
