"""What follows from positions and borders is found once per micro-batch, as if each layer found it for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from neomoba_dist.model.attention import moba, packed
from neomoba_dist.model.attention.kernels.layout import packed_positions
from neomoba_dist.model.attention.moba import moba_attention, place_blocks
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.models import tiny_batch, tiny_model

BORDERS = [0, 0, 70, 71, 300, 300]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("top_k", [3, 99])
def test_known_places_change_no_bit(causal: bool, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(300, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    borders = torch.tensor(BORDERS, dtype=torch.int32)
    placed = place_blocks(borders, 300, block_size=16, head_dim=16, dtype=torch.float32)
    runs = []
    for known in (None, placed):
        out = moba_attention(*leaves, block_size=16, top_k=top_k, causal=causal, cu_seqlens=borders, placed=known)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(got.equal(want) for got, want in zip(*runs, strict=True))
    assert runs[0][0].abs().max() > 0


def test_borders_are_checked_where_blocks_are_placed() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to 300"):
        place_blocks(torch.tensor([0, 299], dtype=torch.int32), 300, block_size=16, head_dim=16, dtype=torch.float32)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize(
    "changes", [{}, {"key_conv_width": 3}, {"attention": "sliding_window", "sliding_window": 4}], ids=str
)
def test_a_micro_batch_finds_everything_once(
    changes: dict[str, Any], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of three layers, counted where each thing is made."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    for module, name in (
        (packed, "rope_tables"),
        (packed, "place_blocks"),
        (packed, "packed_positions"),
        (packed, "inside_documents"),
        (moba, "check_cu_seqlens"),
    ):
        count(module, name)
    model = NeoBERT(tiny_model(**changes), Mesh.single(), recompute=recompute)
    model(tiny_batch(0))[0].backward()
    assert set(counts.values()) == {1}
    assert {"rope_tables", "place_blocks", "check_cu_seqlens"} <= counts.keys()


def test_borders_are_searched_whole() -> None:
    """A slice of them is nothing that inductor could search before torch 2.13 (pytorch #182343)."""
    borders = torch.tensor(BORDERS, dtype=torch.int32)
    graph = make_fx(lambda borders: packed_positions(300, borders))(borders).graph
    searched = [node.args[0] for node in graph.nodes if node.target is torch.ops.aten.searchsorted.Tensor]
    assert searched
    assert all(node.target is not torch.ops.aten.slice.Tensor for node in searched)
    assert packed_positions(300, borders)[0].tolist() == [1] * 70 + [2] + [3] * 229
