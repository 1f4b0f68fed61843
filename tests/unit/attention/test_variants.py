"""Sliding windows, score biases and the key convolution against float64 loops; whole models of every kind."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention import layer as attention
from neomoba_dist.model.attention.kernels import masks as mask_chunks
from neomoba_dist.model.attention.key_conv import convolve_keys
from neomoba_dist.model.attention.layer import Attention, set_full_attention
from neomoba_dist.model.attention.moba import MobaOptions
from neomoba_dist.model.attention.sliding_window import biased_attention, sliding_window_attention
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.model.positions import ScoreBias
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import step_flops, window_pairs
from tests.models import tiny_batch, tiny_model
from tests.reference import Bias, attention_loops, key_conv_loops, keys_in_document, keys_of_moba, t5_bucket

BORDERS = [0, 23, 23, 24, 60]
CU_SEQLENS = torch.tensor([*BORDERS, 60, 60], dtype=torch.int32)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q with four heads, k and v with two, and an upstream gradient."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(60, heads, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def assert_equal(actual: Tensor, expected: Tensor, leaves: list[Tensor], upstream: Tensor, atol: float) -> None:
    """Outputs and the gradients of all leaves."""
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=atol)
    found = torch.autograd.grad(actual, leaves, upstream, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, upstream.double(), allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other.double(), atol=atol, rtol=atol)


def window_rule(window: int, far: int, causal: bool) -> Any:
    def sees(i: int, j: int, length: int) -> bool:
        if causal:
            return j <= i and (i - j < window or j < far)
        return abs(i - j) < window or j < far or i < far

    return sees


def make_bias(kind: str, causal: bool) -> ScoreBias:
    config = tiny_model(position_embedding=kind, objective="clm" if causal else "mlm")
    return ScoreBias("bias", config, Initializer(Mesh.single(), 0, 1.0, torch.float64))


def bias_loops(bias: ScoreBias, kind: str, causal: bool) -> Bias:
    if kind == "alibi":
        return lambda head, query, key: torch.tensor(
            -(2.0 ** (-2 * (head + 1))) * abs(query - key), dtype=torch.float64
        )
    table = bias.table
    assert table is not None
    return lambda head, query, key: table[head, t5_bucket(query - key, causal)]


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("far", [0, 3])
@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window(causal: bool, window: int, far: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_chunks, "CHUNK_QUERIES", chunk)
    q, k, v, upstream = inputs()
    out = sliding_window_attention(q, k, v, window=window, global_tokens=far, causal=causal, cu_seqlens=CU_SEQLENS)
    expected = attention_loops(q, k, v, keys_in_document(BORDERS, window_rule(window, far, causal)))[0]
    assert_equal(out, expected, [q, k, v], upstream, 1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kind", ["window", "alibi"])
def test_short_floats(kind: str, dtype: torch.dtype, atol: float) -> None:
    q, k, v, upstream = inputs(dtype)
    if kind == "window":
        out = sliding_window_attention(q, k, v, window=5, global_tokens=2, causal=False, cu_seqlens=CU_SEQLENS)
        expected = attention_loops(q, k, v, keys_in_document(BORDERS, window_rule(5, 2, False)))[0]
    else:
        bias = make_bias(kind, True)
        out = biased_attention(q, k, v, bias, causal=True, cu_seqlens=CU_SEQLENS)
        seen = keys_in_document(BORDERS, lambda i, j, _: j <= i)
        expected = attention_loops(q, k, v, seen, bias_loops(bias, kind, True))[0]
    assert out.dtype == dtype
    assert_equal(out, expected, [q, k, v], upstream, atol)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("core", ["full", "moba", "sliding_window"])
@pytest.mark.parametrize("kind", ["alibi", "t5_relative"])
def test_score_bias(kind: str, core: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_chunks, "CHUNK_QUERIES", 11)
    q, k, v, upstream = inputs()
    bias = make_bias(kind, causal)
    seen = keys_in_document(BORDERS, lambda i, j, _: j <= i or not causal)
    if core == "sliding_window":
        seen = keys_in_document(BORDERS, window_rule(6, 2, causal))
        out = sliding_window_attention(
            q, k, v, window=6, global_tokens=2, causal=causal, cu_seqlens=CU_SEQLENS, bias=bias
        )
    else:
        moba = MobaOptions(4, 3) if core == "moba" else None
        out = biased_attention(q, k, v, bias, causal=causal, cu_seqlens=CU_SEQLENS, moba=moba)
        if moba is not None:
            seen = keys_of_moba(q, k, block_size=4, top_k=3, causal=causal, borders=BORDERS)
    expected = attention_loops(q, k, v, seen, bias_loops(bias, kind, causal))[0]
    assert_equal(out, expected, [q, k, v, *bias.parameters()], upstream, 1e-12)


def test_chunks_stay_small() -> None:
    """Never [T, T]: a window's work grows with the window, a biased layer's chunks have a fixed size."""
    tokens = 32768
    positions = torch.zeros(2, tokens, dtype=torch.int64)
    chunks = list(mask_chunks.Mask(positions, positions, False, aligned=True, window=512).chunks(12, biased=False))
    areas = [(rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in chunks]
    assert max(areas) <= 512 * 3 * 512
    assert sum(areas) <= tokens * 3 * 512
    biased = mask_chunks.Mask(positions, positions, True, aligned=True).chunks(12, biased=True)
    assert all((r.stop - r.start) * (c.stop - c.start) * 12 <= mask_chunks.CHUNK_ELEMENTS for r, c in biased)


@pytest.mark.parametrize(("width", "causal"), [(1, True), (3, True), (4, True), (1, False), (3, False), (5, False)])
def test_key_convolution(width: int, causal: bool) -> None:
    _, k, v, _ = inputs()
    weight = torch.randn(16, width, dtype=torch.float64, requires_grad=True)
    out = convolve_keys(k, weight, CU_SEQLENS, causal, Mesh.single())
    assert_equal(out, key_conv_loops(k, weight, BORDERS, causal), [k, weight], v.detach(), 1e-12)
    if width > 1:
        unpacked = convolve_keys(k, weight, torch.tensor([0, 60], dtype=torch.int32), causal, Mesh.single())
        assert (unpacked - out).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("far", [0, 3, 10])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_window_pairs(window: int, far: int, causal: bool) -> None:
    config = tiny_model(
        objective="clm" if causal else "mlm", sliding_window=window, global_tokens=far, attention="sliding_window"
    )
    lengths = [1, 5, 30]
    sees = window_rule(window, far, causal)
    enumerated = sum(sees(i, j, n) for n in lengths for i in range(n) for j in range(n))
    assert window_pairs(torch.tensor(lengths), config) == enumerated
    full = step_flops(config, torch.tensor(lengths), 0, True) - step_flops(config, torch.tensor(lengths), 0, False)
    dense = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    assert full == 2 * 3 * 4 * (dense - enumerated) * 32  # two such layers, forward and twice backward


VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"attention": "sliding_window", "sliding_window": 8},
    "window_global": {"attention": "sliding_window", "sliding_window": 4, "global_tokens": 2},
    "mixed": {"attention": "moba*1,sliding_window*1,full*1", "sliding_window": 8, "key_conv_width": 3},
    "learned": {"position_embedding": "learned"},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "alibi": {"position_embedding": "alibi"},
    "t5": {"position_embedding": "t5_relative"},
    "none": {"position_embedding": "none"},
    "yarn": {
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0,
        "original_max_position_embeddings": 32,
        "key_conv_width": 5,
    },
}


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """One document of a batch on its own."""
    return replace(
        batch,
        input_ids=batch.input_ids[start:stop],
        labels=batch.labels[start:stop],
        position_ids=batch.position_ids[start:stop],
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
    )


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("name", VARIANTS)
def test_models(name: str, objective: str) -> None:
    """Packed = unpacked, causality, a gradient for every parameter, and a result of its own."""
    config = tiny_model(objective=objective, **VARIANTS[name])
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    batch = tiny_batch(0, objective=objective)
    hidden = model.hidden_states(batch)
    standard = NeoBERT(tiny_model(objective=objective), Mesh.single(), dtype=torch.float64, seed=5)
    assert (standard.hidden_states(batch) - hidden).abs().max() > 1e-2
    for start, stop in pairwise(batch.cu_seqlens.unique().tolist()):
        torch.testing.assert_close(model.hidden_states(cut(batch, start, stop)), hidden[start:stop], atol=1e-10, rtol=0)
    changed = batch.input_ids.clone()
    changed[30] = (changed[30] + 1) % 151
    moved = (model.hidden_states(replace(batch, input_ids=changed)) - hidden).abs().amax(-1)
    assert moved[30] > 1e-6
    assert moved[49:].max() == 0 or moved[49:].max() < 1e-12  # other documents
    assert (moved[:30].max() < 1e-12) == (objective == "clm")
    model(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("attention", ["moba", "sliding_window", "moba*1,sliding_window*1,full*1"])
def test_full_steps_turn_every_layer_full_and_back(attention: str) -> None:
    model = NeoBERT(tiny_model(attention=attention, sliding_window=8), Mesh.single(), seed=5)
    dense = NeoBERT(tiny_model(attention="full"), Mesh.single(), seed=5)
    batch = tiny_batch(0)
    sparse_loss, full_loss = model(batch)[0], dense(batch)[0]
    assert abs(sparse_loss - full_loss) > 1e-3
    set_full_attention(model, True)
    assert model(batch)[0] == full_loss
    set_full_attention(model, False)
    assert model(batch)[0] == sparse_loss
    kinds = [module.kind for module in model.modules() if isinstance(module, Attention)]
    assert kinds == list(model.config.layer_attentions)
    assert len(kinds) == 3
    assert kinds[-1] == "full"


def test_rows_bound_the_documents_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        bounds.append(options["longest"])
        return q

    monkeypatch.setattr(attention, "full_attention", record)
    model = NeoBERT(tiny_model(hybrid_layer_count=3), Mesh.single(), row_length=64)
    for mode in (True, False):
        model.train(mode).hidden_states(tiny_batch(0, rows=2))
    assert bounds == [64] * 3 + [None] * 3
