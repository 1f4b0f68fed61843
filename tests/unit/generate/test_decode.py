"""Decoding with a cache equals one pass over the whole text: logits, chosen blocks and means, for every chunk size."""

from typing import Any

import pytest
import torch

from neomoba_dist.generate.decode import Decoder, generate
from neomoba_dist.generate.stage import GenerationError, Stage
from neomoba_dist.model.attention import cache as cache_module
from neomoba_dist.model.attention import moba
from neomoba_dist.model.attention.kernels.full import attend_documents
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import greedy_by_recomputing, random_documents, whole_pass
from tests.models import tiny_model

LENGTHS = (61, 17, 1, 40)  # partial blocks, whole ones, a single token; blocks of 8
VARIANTS: dict[str, dict[str, Any]] = {
    "group_max": {"moba_gate": "kv_group", "moba_pooling": "max"},
    "minmax": {"moba_pooling": "minmax"},
    "standard": {},
    "all_heads": {"num_key_value_heads": 4},
    "one_head": {"num_key_value_heads": 1, "qk_norm": False},
    "experts": {"num_experts": 4, "moe_intermediate_size": 16, "router_scoring": "sigmoid"},
    "key_conv": {"key_conv_width": 4},
    "window": {"attention": "sliding_window*1,moba*1,full*1", "sliding_window": 5, "key_conv_width": 3},
    "window_global": {"attention": "sliding_window", "sliding_window": 5, "global_tokens": 2},
    "alibi": {"position_embedding": "alibi"},
    "t5": {"position_embedding": "t5_relative", "key_conv_width": 3},
    "learned": {"position_embedding": "learned", "tie_word_embeddings": True},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "yarn": {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0, "original_max_position_embeddings": 32},
}


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> NeoBERT:
    return NeoBERT(tiny_model(objective="clm", **changes), Mesh.single(), dtype=dtype, seed=5)


def in_chunks(decoder: Decoder, documents: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of every document, fed `chunk` tokens at a time; documents that have ended wait."""
    parts: list[list[torch.Tensor]] = [[] for _ in documents]
    for start in range(0, max(map(len, documents)), chunk):
        tokens = [ids[start : start + chunk] for ids in documents]
        hidden = decoder.step(tokens)
        assert hidden is not None
        for part, logits in zip(parts, decoder.stage.logits(hidden).split([len(ids) for ids in tokens]), strict=True):
            part.append(logits[:, :151])
    return [torch.cat(part) for part in parts]


def check(changes: dict[str, Any], chunk: int, decode: str) -> None:
    model, documents = make(**changes), random_documents(LENGTHS)
    decoder = Decoder(Stage.of(model), [n + 3 for n in LENGTHS], decode)
    found, expected = in_chunks(decoder, documents, chunk), whole_pass(model, documents, decode)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("name", ["standard", "key_conv"])
def test_every_step_equals_a_whole_pass(name: str, chunk: int, decode: str) -> None:
    check(VARIANTS[name], chunk, decode)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"standard", "key_conv"}))
def test_every_variant(name: str) -> None:
    check(VARIANTS[name], 3, "moba")


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["window", "window_global"])
def test_windows_read_the_window_only(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the global tokens; every step still equals a whole pass."""
    read: list[int] = []

    def record(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(len(k))
        return masked_attention(q, k, *rest)

    masked_attention = cache_module.masked_attention
    monkeypatch.setattr(cache_module, "masked_attention", record)
    check(VARIANTS[name], chunk, "moba")
    assert read
    assert max(read) <= len(LENGTHS) * (chunk + 5 - 1 + VARIANTS[name].get("global_tokens", 0))
    assert max(read) < sum(LENGTHS)


@pytest.mark.full
@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 16, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_grid(name: str, chunk: int, decode: str) -> None:
    if decode == "moba" or "window" not in name:
        check(VARIANTS[name], chunk, decode)


def test_document_by_document_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []

    def compare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **geometry: Any) -> torch.Tensor:
        expected = moba.moba_attention(q, k, v, **geometry)
        found = attend_documents(q, k, v, decoder.cache.step.document_ranges)
        largest.append(float((found - expected).abs().max()))
        return expected

    monkeypatch.setattr(cache_module, "moba_attention", compare)
    for chunk in (2, 8):
        decoder = Decoder(Stage.of(make()), [n + 3 for n in LENGTHS], "full")
        in_chunks(decoder, random_documents(LENGTHS), chunk)
    assert len(largest) > 100
    assert max(largest) <= 1e-12


def test_moba_differs_from_full() -> None:
    model, documents = make(), random_documents(LENGTHS)
    sparse, dense = (whole_pass(model, documents, decode)[0] for decode in ("moba", "full"))
    assert (sparse - dense).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 8, 61])
def test_means_of_complete_blocks_have_the_bits_of_a_whole_pass(dtype: torch.dtype, chunk: int) -> None:
    model, documents = make(dtype, key_conv_width=3), random_documents(LENGTHS)
    decoder = Decoder(Stage.of(model), LENGTHS, "moba")
    in_chunks(decoder, documents, chunk)
    for layer in decoder.cache.layers[:2]:
        whole = moba.block_means(layer.k.contiguous(), block_size=8, cu_seqlens=decoder.cache.borders)
        assert layer.means is not None
        filled, first = layer.means.abs().amax((1, 2)) > 0, 0
        for length in LENGTHS:
            complete, blocks = length // 8, -(-length // 8)
            assert filled[first : first + blocks].tolist() == [True] * complete + [False] * (blocks - complete)
            assert torch.equal(layer.means[first : first + complete], whole[first : first + complete])
            first += blocks
    assert decoder.cache.layers[2].means is None  # the last layer is full


def test_routes_equal_those_of_a_whole_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, numbered from the start of each document."""
    seen: list[tuple[int, torch.Tensor]] = []

    def record(q: torch.Tensor, means: torch.Tensor, **geometry: Any) -> torch.Tensor:
        block_indices, keys = original(q, means, **geometry), geometry["cu_seqlens_k"]
        keys = geometry["cu_seqlens"] if keys is None else keys
        if geometry["top_k"] > 1:  # 1: a full layer
            firsts = [0, *(-(-keys.diff() // 8)).cumsum(0).tolist()][:-1]
            parts = zip(firsts, block_indices.split(geometry["cu_seqlens"].diff().tolist()), strict=True)
            seen.extend((d, torch.where(part >= 0, part - first, -1)) for d, (first, part) in enumerate(parts))
        return block_indices

    original = moba.select_blocks
    monkeypatch.setattr(moba, "select_blocks", record)
    monkeypatch.setattr(cache_module, "select_blocks", record)
    model, documents = make(), random_documents(LENGTHS)
    whole_pass(model, documents, "moba")
    whole, seen[:] = list(seen), []
    in_chunks(Decoder(Stage.of(model), LENGTHS, "moba"), documents, 20)  # too long for the dense shortcut
    for document in range(len(LENGTHS)):
        for layer in range(2):
            expected = [block_indices for d, block_indices in whole if d == document][layer]
            found = torch.cat([block_indices for d, block_indices in seen if d == document][layer::2])
            assert torch.equal(found, expected)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_greedy_generation(decode: str) -> None:
    model, prompts = make(key_conv_width=3), random_documents((30, 1, 23, 8))
    expected = [greedy_by_recomputing(model, prompt, 12, decode) for prompt in prompts]
    assert generate(Stage.of(model), prompts, 12, decode=decode) == expected
    assert generate(Stage.of(model), prompts, 12, decode=decode, prefill_chunk=7) == expected
    assert [generate(Stage.of(model), [prompt], 12, decode=decode)[0] for prompt in prompts] == expected
    stop = expected[0][5]
    stopped = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert generate(Stage.of(model), prompts, 12, decode=decode, stop_id=stop) == stopped
    assert generate(Stage.of(model), prompts, 0, decode=decode) == [[], [], [], []]


def test_decoding_leaves_training_as_it_was() -> None:
    model, documents = make(), random_documents(LENGTHS)
    before = whole_pass(model, documents, "moba")
    generate(Stage.of(model), documents, 2, decode="full")
    assert all(torch.equal(a, b) for a, b in zip(before, whole_pass(model, documents, "moba"), strict=True))


def test_memory_of_the_cache() -> None:
    """Keys and values of the capacities, means of their blocks, tails; nothing grows while decoding."""
    model = make(torch.float32, key_conv_width=4)
    decoder = Decoder(Stage.of(model), [61, 17], "moba")
    per_token = 2 * 8 * 4  # KV heads x head size x bytes
    blocks = (61 + 17 + 2 * 7) // 8  # the upper bound that routing works with
    expected = 3 * (2 * (61 + 17) + 2 * 3) * per_token + 2 * blocks * per_token
    assert decoder.cache.num_bytes() == expected
    in_chunks(decoder, random_documents((61, 17)), 10)
    assert decoder.cache.num_bytes() == expected
    assert Decoder(Stage.of(model), [61, 17], "full").cache.num_bytes() == expected - 2 * blocks * per_token


def test_refusals() -> None:
    stage = Stage.of(make())
    with pytest.raises(GenerationError, match="generation needs a causal model"):
        Decoder(Stage.of(NeoBERT(tiny_model(), Mesh.single())), [4])
    with pytest.raises(GenerationError, match="decode must be one of full, moba"):
        Decoder(stage, [4], "dense")
    with pytest.raises(ValueError, match="document 1: 0 \\+ 3 tokens do not fit a cache of 2"):
        Decoder(stage, [4, 2]).step([[1], [1, 2, 3]])
    with pytest.raises(GenerationError, match="a prompt is empty"):
        generate(stage, [[1], []], 4)
    with pytest.raises(GenerationError, match="1025 tokens are more than the 1024 positions"):
        generate(Stage.of(make(position_embedding="learned")), [[1]], 1024)
    broken = make()
    broken.final_norm.norm.weight.data.fill_(float("nan"))
    with pytest.raises(GenerationError, match="logits are not numbers"):
        generate(Stage.of(broken), [[1]], 1)
