"""Cross attention and the layers of an encoder-decoder, in float64 against their formulas."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neomoba_dist.model.attention.kernels.cross import RUN, cross_attention
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.encoder_decoder import DecoderBlock, EncoderDecoder
from neomoba_dist.model.init import views_of
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import cross_flops, step_flops
from tests.models import tiny_batch, tiny_model
from tests.reference import attention_loops, document_start_and_stop

QUERIES, KEYS = [0, 4, 4, 7, 9], [0, 5, 8, 10, 16]  # the second document is all in the encoder


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def seen(token: int, head: int) -> range:
    """Every key of the query's document."""
    document = next(i for i, (a, b) in enumerate(pairwise(QUERIES)) if a <= token < b)
    return range(*KEYS[document : document + 2])


@pytest.mark.parametrize("kernel", ["documents", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_query_sees_its_document(kernel: str, kv_heads: int) -> None:
    q = draw(9, 4, 8).requires_grad_()
    k, v = (scale * draw(16, kv_heads, 8).requires_grad_() for scale in (1, 2))
    borders = [torch.tensor(side, dtype=torch.int32) for side in (QUERIES, KEYS)]
    found, wanted = RUN[kernel](q, k, v, *borders, [9, 16]), attention_loops(q, k, v, seen)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert torch.equal(cross_attention(q, k, v, *borders), RUN["documents"](q, k, v, *borders, [9, 16]))
    for one, other in zip(
        *(torch.autograd.grad(out, (q, k, v), draw(9, 4, 8)) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layers(placement: str, qk_norm: bool) -> None:
    """Both stacks by their parts, cross attention by its matrices and loops."""
    config = tiny_model(objective="span_corruption", num_decoder_layers=2, norm_placement=placement, qk_norm=qk_norm)
    model, batch = (
        EncoderDecoder(config, Mesh.single(), dtype=torch.float64, seed=5),
        tiny_batch(0, 2, "span_corruption"),
    )
    encoder, sizes = batch.encoder, (model.mesh, torch.float64)
    assert encoder is not None
    packed = PackedTokens.of(encoder.position_ids, encoder.cu_seqlens, config.encoder, *sizes)
    x = model.embedding.weight[encoder.input_ids]
    for block in model.blocks:
        x = block.transform(x, encoder.position_ids, packed)[0]
    memory = model.final_norm.norm(x)
    packed = PackedTokens.of(batch.position_ids, batch.cu_seqlens, config.decoder, *sizes)
    x = model.embedding.weight[batch.input_ids]
    for block in model.decoder_blocks:
        assert isinstance(block, DecoderBlock)
        first, second, third = block.attention_norm, block.cross_norm, block.mlp_norm
        if placement == "pre":
            x = x + block.attention(first(x), packed)
            x = x + cross_by_loops(block, second(x), memory, batch.cu_seqlens, encoder.cu_seqlens)
            x = x + block.mlp(third(x))
        else:
            x = first(x + block.attention(x, packed))
            x = second(x + cross_by_loops(block, x, memory, batch.cu_seqlens, encoder.cu_seqlens))
            x = third(x + block.mlp(x))
    torch.testing.assert_close(model.hidden_states(batch), model.decoder_norm.norm(x), rtol=0, atol=1e-10)
    assert [block.attention.kind for block in model.blocks] == ["moba", "moba", "full"]
    assert [block.attention.kind for block in model.decoder_blocks] == ["moba", "full"]
    causal = [block.attention.config.causal for block in (*model.blocks, *model.decoder_blocks)]
    assert causal == [False] * 3 + [True] * 2


def cross_by_loops(block: DecoderBlock, x: Tensor, memory: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> Tensor:
    layer = block.cross_attention
    weights = {shard.name.split(".")[-1]: view for p in layer.parameters() for shard, view in views_of(p, p)}
    q, k, v = (
        (states @ weights[name].T).unflatten(-1, (-1, layer.head_dim))
        for states, name in ((x, "q_proj"), (memory, "k_proj"), (memory, "v_proj"))
    )
    if layer.config.qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    queries, keys = cu_queries.tolist(), cu_keys.tolist()

    def of_document(token: int, head: int) -> range:
        start, _ = document_start_and_stop(token, queries)
        document = max(i for i, border in enumerate(queries) if border == start)
        return range(*keys[document : document + 2])

    return attention_loops(q, k, v, of_document)[0].flatten(1) @ weights["o_proj"].T


def test_the_decoder_needs_its_document_and_sees_no_other() -> None:
    model = EncoderDecoder(
        tiny_model(objective="span_corruption", num_decoder_layers=2), Mesh.single(), dtype=torch.float64, seed=5
    )
    batch = tiny_batch(0, 1, "span_corruption")
    assert batch.encoder is not None
    before = model.hidden_states(batch)
    batch.encoder.input_ids[3] += 1  # of the first document, of 49 tokens in the decoder
    changed = (model.hidden_states(batch) - before).abs().amax(1) > 1e-9
    assert changed[:49].all()
    assert not changed[49:].any()


def test_operations_are_those_of_every_matrix() -> None:
    config = tiny_model(objective="span_corruption", num_decoder_layers=2, tie_word_embeddings=True)
    model = EncoderDecoder(config, Mesh.single())
    names = {shard.name: view.numel() for p in model.parameters() for shard, view in views_of(p, p)}
    cross = sum(size for name, size in names.items() if "cross" in name and name.endswith("_proj"))
    lengths, encoder = torch.tensor([5, 0, 3]), torch.tensor([7, 2, 4])
    pairs = 2 * 4 * 32 * (35 + 12)  # two layers, each score and each value of four heads of 8
    halves = [sum(v for n, v in names.items() if "cross" in n and n.endswith(f"{p}_proj")) for p in "qokv"]
    assert sum(halves) == cross
    assert cross_flops(config, lengths, encoder) == 2 * (8 * sum(halves[:2]) + 13 * sum(halves[2:])) + pairs
    whole = step_flops(config, lengths, 6, True, encoder)
    parts = step_flops(config.encoder, encoder, 0, True) + step_flops(config.decoder, lengths, 6, True)
    assert whole == parts + 3 * cross_flops(config, lengths, encoder)
    numbers = [name for name in names if name.startswith("blocks.")]
    assert {int(name.split(".")[1]) for name in numbers} == set(range(5))
