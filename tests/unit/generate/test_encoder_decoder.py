"""Decoding with an encoder-decoder: what its caches give is what one pass over both whole texts gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.sample import Sampling
from neomoba_dist.generate.stage import GenerationError, Stage, batch_of
from neomoba_dist.model.attention.cross import CrossAttention
from neomoba_dist.model.encoder_decoder import EncoderDecoder
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import random_documents
from tests.models import tiny_model

SOURCES = random_documents((61, 17, 1, 40))
STARTS = [[0]] * 4
VARIANTS: dict[str, dict[str, Any]] = {
    "post": {"norm_placement": "post"},
    "t5": {"position_embedding": "t5_relative", "key_conv_width": 3, "qk_norm": False},
    "window": {"attention": "sliding_window*1,moba*2,moba*1,full*1", "sliding_window": 5},
    "learned": {"position_embedding": "learned", "tie_word_embeddings": True},
}


def make(**changes: Any) -> EncoderDecoder:
    config = tiny_model(objective="span_corruption", num_decoder_layers=2, **changes)
    return EncoderDecoder(config, Mesh.single(), dtype=torch.float64, seed=5)


def best_of_one_pass(model: EncoderDecoder, written: list[list[int]], decode: str) -> list[list[int]]:
    """The likeliest token at each place of a decoder that has read what stands before it, and `SOURCES`."""
    for block in (*model.blocks, *model.decoder_blocks):
        attention = block.attention
        attention.full = attention.kind == "full" or (attention.kind == "moba" and decode == "full")
    read = [[*start, *ids[:-1]] for start, ids in zip(STARTS, written, strict=True)]
    batch = replace(batch_of(read, "cpu"), encoder=batch_of(SOURCES, "cpu"))
    with torch.no_grad():
        best = model.logits(model.hidden_states(batch)).argmax(-1)
    return [part.tolist() for part in best.split([len(ids) for ids in read])]


def check(decode: str, **changes: Any) -> list[list[int]]:
    model = make(**changes)
    written = generate(Stage.of(model), STARTS, 24, sources=SOURCES, decode=decode)
    assert written == best_of_one_pass(model, written, decode)
    assert len({token for ids in written for token in ids}) > 5
    return written


def test_every_token_is_that_of_one_pass() -> None:
    """With full attention, with MoBA, and with MoBA in the encoder alone, which are three different texts."""
    full, sparse = check("full"), check("moba")
    mixed = generate(Stage.of(make()), STARTS, 24, sources=SOURCES, decode="full", prefill="moba")
    assert full != sparse != mixed != full


@pytest.mark.full
@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, decode: str) -> None:
    check(decode, **VARIANTS[variant])


def test_texts_do_not_see_each_other() -> None:
    stage = Stage.of(make())
    written = generate(stage, STARTS, 6, sources=SOURCES)
    assert [generate(stage, [[0]], 6, sources=[source])[0] for source in SOURCES] == written
    assert generate(stage, STARTS, 6, sources=SOURCES[::-1]) == written[::-1] != written


def test_the_encoder_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = make(), []
    project = CrossAttention.project

    def counted(layer: CrossAttention, states_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(len(states_MH))
        return project(layer, states_MH)

    monkeypatch.setattr(CrossAttention, "project", counted)
    generate(Stage.of(model), STARTS, 8, sources=SOURCES)
    assert lengths == [sum(map(len, SOURCES))] * 2, "once in each of two layers"


def test_each_ends_with_an_id_of_its_own() -> None:
    stage = Stage.of(make())
    whole = generate(stage, STARTS, 12, sources=SOURCES)
    ends = [ids[3] for ids in whole]
    expected = [ids[: ids.index(end)] for ids, end in zip(whole, ends, strict=True)]
    assert generate(stage, STARTS, 12, sources=SOURCES, stop_id=ends) == expected
    assert generate(stage, STARTS, [3, 0, 12, 1], sources=SOURCES) == [
        ids[:n] for ids, n in zip(whole, (3, 0, 12, 1), strict=True)
    ]


def test_sampling_counts_what_the_decoder_wrote() -> None:
    stage, sampling = Stage.of(make()), Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.5)
    found = generate(stage, STARTS, 12, sources=SOURCES, sampling=sampling)
    assert found == generate(stage, STARTS, 12, sources=SOURCES, sampling=sampling)
    assert found[0] == generate(stage, [[0]], 12, sources=SOURCES[:1], sampling=sampling)[0]
    once = generate(stage, STARTS, 12, sources=SOURCES, sampling=Sampling(repetition_penalty=1e6))
    assert all(len(set(ids)) == 12 and 0 not in ids for ids in once), "the start token counts as written"


def test_what_does_not_fit() -> None:
    stage = Stage.of(make(position_embedding="learned", max_position_embeddings=60))
    with pytest.raises(GenerationError, match="61 tokens are more than the 60 positions"):
        generate(stage, STARTS, 8, sources=SOURCES)
    with pytest.raises(GenerationError, match="an encoder-decoder needs sources"):
        generate(stage, STARTS, 8)
    with pytest.raises(GenerationError, match="a prompt is empty"):
        generate(stage, STARTS, 8, sources=[*SOURCES[:3], []])
