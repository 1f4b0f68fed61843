"""Span corruption: what T5 promises of it, what is a function of (seed, row) alone, the fixed shapes of batches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.config.span_corruption import corrupted_lengths, decoder_tokens, encoder_tokens, noise_counts
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.builders import SpanCorruptionBuilder
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import RowBlock, Source
from neomoba_dist.data.span_corruption import Corrupted, SpanCorruption, choose_spans, encode_source, find_sentinels
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_corpus, make_tokenizer

VOCAB, SPECIAL, LENGTH = 300, 100, 128
ORDINARY = np.arange(VOCAB) >= SPECIAL
SENTINELS = np.arange(10, 90)


def _block(rows: int, first_row: int = 0, documents: tuple[int, ...] = (90, 3, 20)) -> RowBlock:
    """Rows that hold documents of these lengths, then padding. The first document has special tokens at both ends."""
    tokens = np.random.default_rng(first_row).integers(SPECIAL, VOCAB, (rows, LENGTH))
    tokens[:, sum(documents) :] = 0
    tokens[:, [0, documents[0] - 1]] = 2, 3
    offsets = np.cumsum([0, *documents[:-1]])
    starts = (np.arange(rows)[:, None] * LENGTH + offsets).reshape(-1)
    ids = np.arange(first_row, first_row + rows)
    return RowBlock(tokens.reshape(-1).astype(np.uint16), ids, starts, np.tile(documents, rows), 0, {})


def _restored(pair: Corrupted) -> list[int]:
    """The text, from what the encoder reads and what the decoder writes."""
    spans: dict[int, list[int]] = {}
    for token in pair.target.tolist():
        if token in SENTINELS:
            spans[token] = found = []
        else:
            found.append(token)
    if spans:
        assert spans.popitem()[1] == [], "the last sentinel ends the text"
    assert list(spans) == SENTINELS[: len(spans)].tolist()
    assert all(spans.values()), "no span is empty, so no two sentinels are neighbours"
    text: list[int] = []
    for token in pair.source.tolist():
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


def test_both_sides_together_hold_the_text() -> None:
    block = _block(200)
    rows = SpanCorruption(7, SENTINELS, ORDINARY).corrupt(block)
    assert [len(row) for row in rows] == [3] * 200
    pairs = [pair for row in rows for pair in row]
    for pair, start, length in zip(pairs, block.piece_start, block.piece_length, strict=True):
        text = block.tokens_T[start : start + length].tolist()
        assert _restored(pair) == text
        body = length - 2 * (text[0] == 2)
        assert len(pair.source) == length - body + encoder_tokens(body)
        assert len(pair.target) == decoder_tokens(body)
        assert not any(a in SENTINELS and b in SENTINELS for a, b in pairwise(pair.source.tolist()))
        assert not {2, 3} & set(pair.target.tolist())


def test_density_and_length_of_the_spans() -> None:
    for tokens in (4, 10, 100, 512, 4096, 100_000):
        dropped, spans = noise_counts(tokens)
        assert abs(dropped - 0.15 * tokens) <= 0.5
        assert abs(spans - max(1, dropped / 3)) <= 0.5
        assert len(choose_spans(tokens, np.random.default_rng(tokens).integers(1 << 63, size=tokens))[0]) == spans
    assert noise_counts(3) == (0, 0)


def test_every_place_is_dropped_about_equally_often() -> None:
    counts, draws = np.zeros(40), 5_000
    for words in np.random.default_rng(1).integers(1 << 63, size=(draws, 40)):
        starts, lengths = choose_spans(40, words)
        assert lengths.min() > 0
        assert (starts[1:] > (starts + lengths)[:-1]).all(), "a kept token stands between two spans"
        for start, length in zip(starts, lengths, strict=True):
            counts[start : start + length] += 1
    assert counts.sum() == draws * noise_counts(40)[0]
    inner = counts[6:-6] / draws
    assert np.abs(inner - 6 / 40).max() < 0.025
    assert counts[[0, -1]] / draws == pytest.approx(2 / 35, abs=0.012), "2 spans in 35 gaps"


def test_a_function_of_seed_and_row() -> None:
    def drawn(seed: int, block: RowBlock) -> list[list[list[int]]]:
        rows = SpanCorruption(seed, SENTINELS, ORDINARY).corrupt(block)
        return [[side.tolist() for pair in row for side in pair] for row in rows]

    block = _block(3, first_row=5)
    assert drawn(7, block) == drawn(7, block)
    assert drawn(7, block.rows(1, 3)) == drawn(7, block)[1:]
    assert drawn(8, block) != drawn(7, block)
    renamed = RowBlock(**{**vars(block), "row_ids": block.row_ids + 1})
    assert drawn(7, renamed)[0] != drawn(7, block)[0]


def test_the_drawn_spans_never_change() -> None:
    """Pinned: a resumed run draws the spans of the run it continues."""
    tokens = np.arange(100, 132)
    pair = SpanCorruption(3, SENTINELS, ORDINARY).corrupt(
        RowBlock(tokens, np.array([1]), *np.array([[0], [32]]), 0, {})
    )
    assert pair[0][0].target.tolist() == [10, 116, 117, 118, 119, 11, 125, 12]


def test_no_row_is_longer_than_its_bound() -> None:
    generator = np.random.default_rng(0)
    for _ in range(1000):
        length, most = int(generator.integers(1, 400)), int(generator.integers(1, 40))
        shortest = int(generator.choice([1, 4, 9, 17]))
        lengths = [shortest] * min(most, length // shortest)
        if len(lengths) < most and length > sum(lengths):
            lengths.append(length - sum(lengths))
        borders = [int(generator.integers(0, min(2, n) + 1)) for n in lengths]
        bound = corrupted_lengths(length, most)
        source = sum(border + encoder_tokens(n - border) for n, border in zip(lengths, borders, strict=True))
        target = sum(decoder_tokens(n - border) for n, border in zip(lengths, borders, strict=True))
        assert source < bound.encoder, "padding has a place"
        assert target <= bound.decoder
        assert max(noise_counts(n)[1] for n in lengths) < bound.sentinels
    assert corrupted_lengths(100, 25).decoder == 25 * decoder_tokens(4), "nor is any shorter"
    assert corrupted_lengths(110, 10).encoder == 10 * (2 + encoder_tokens(9)) + 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("sentinels"), sentinels=20)


SETTINGS = {"max_documents_per_row": 16, "cache": None, "prefetch": 0}


def _stream(corpus: Corpus, **changes: object) -> UpdateStream:
    layout: dict = {"micro_batch_size": 2, "accumulation": 2, "dp_rank": 0, "dp_size": 1, **changes}
    settings = DataConfig(train="-", **SETTINGS)
    return UpdateStream([Source(corpus)], settings, objective="span_corruption", sequence_length=256, seed=3, **layout)


def _documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    assert batch.encoder is not None
    sides = ((batch.encoder.input_ids, batch.encoder.cu_seqlens), (batch.labels, batch.cu_seqlens))
    cut = [[ids[a:b].tolist() for a, b in pairwise(borders.tolist())] for ids, borders in sides]
    return list(zip(*cut, strict=True))


def test_batches_of_a_real_corpus(corpus: Corpus) -> None:
    stream, lengths = _stream(corpus), corrupted_lengths(256, 16)
    batches, _ = next(iter(stream))
    tokenizer = corpus.tokenizer()
    sentinels = find_sentinels(tokenizer, lengths.sentinels, 256, "it").tolist()
    assert {batch.num_valid for batch in batches} == {sum(batch.local_valid() for batch in batches)}
    found = 0
    for batch in batches:
        encoder = batch.encoder
        assert encoder is not None
        assert (len(encoder.input_ids), len(batch.input_ids)) == (2 * lengths.encoder, 2 * lengths.decoder)
        for source, target in _documents(batch):
            if not target or target[0] == -100:
                continue
            assert set(source) & set(sentinels) == set(target[:-1]) & set(sentinels), "one document on both sides"
            assert target[0] == sentinels[0]
            found += 1
        starts = batch.cu_seqlens[:-1][batch.cu_seqlens.diff() > 0].long()
        assert (batch.input_ids[starts] == stream.rows.padding_id).all()
        inside = torch.ones(len(batch.labels), dtype=torch.bool)
        inside[starts] = False
        follows = inside & (batch.labels >= 0)
        assert torch.equal(batch.input_ids[follows], batch.labels.roll(1)[follows]), "it reads what it wrote before"
        for part in (batch, encoder):
            positions = [p for a, b in pairwise(part.cu_seqlens.tolist()) for p in range(b - a)]
            real = part.position_ids >= 0
            assert torch.equal(part.position_ids[real], torch.tensor(positions)[real])
        short = batch.trimmed()
        assert short.encoder is not None
        assert len(short.cu_seqlens) == len(short.encoder.cu_seqlens) < len(batch.cu_seqlens)
        assert _documents(short) == _documents(batch)[: len(short.cu_seqlens) - 1]
        assert (short.cu_seqlens[-1], short.encoder.cu_seqlens[-1]) == (len(batch.labels), len(encoder.input_ids))
    assert found > 5


def test_ranks_divide_an_update_and_a_resumed_run_goes_on(corpus: Corpus) -> None:
    updates = iter(_stream(corpus))
    whole, second = [next(updates)[0] for _ in range(2)]
    ranks = [next(iter(_stream(corpus, accumulation=1, dp_size=2, dp_rank=rank)))[0][0] for rank in range(2)]
    resumed = _stream(corpus)
    resumed.load_state_dict(next(iter(_stream(corpus)))[1])
    again = next(iter(resumed))[0]
    for one, other in zip([*whole, *second], [*ranks, *again], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_a_damaged_row_becomes_padding(corpus: Corpus) -> None:
    stream = _stream(corpus)
    block = stream.rows.read(stream.rows.row_ids(np.arange(2))).without(np.array([True, False]))
    batch = SpanCorruptionBuilder(
        corpus, DataConfig(train="-", **SETTINGS), objective="span_corruption", length=256, seed=3
    ).build(block)
    assert (batch.labels[: len(batch.labels) // 2] == -100).all()
    assert 0 < batch.num_valid == batch.local_valid()


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram", "bpe"])
def test_sentinels_of_trained_tokenizers(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind, sentinels=6))
    assert find_sentinels(tokenizer, 6, 64, "it").tolist() == [5, 6, 7, 8, 9, 10]
    assert {5, 10} <= set(tokenizer.reserved_ids())
    assert not {5, 6} & set(tokenizer.encode("a <extra_id_0> and <extra_id_1>")), "in a text they are plain text"
    assert tokenizer.decode([6]) == "<extra_id_1>"
    with pytest.raises(DataError, match=r"it: its tokenizer has 6 sentinel tokens .* 64 tokens need 7 .*--sentinels 7"):
        find_sentinels(tokenizer, 7, 64, "it")


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram"])
def test_a_text_with_gaps_is_read_as_a_document_without_spans(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind, sentinels=6))
    encode, (head, tail) = tokenizer.encode, tokenizer.document_borders
    assert encode_source(tokenizer, "import <extra_id_0> as f\nf(<extra_id_1>)", 6) == (
        [*head, *encode("import"), 5, *encode(" as f\nf("), 6, *encode(")"), *tail],
        7,
    )
    assert encode_source(tokenizer, "<extra_id_5>", 6) == ([*head, 10, *tail], None), "the tokenizer's last one"
    with pytest.raises(DataError, match="<extra_id_6>: the tokenizer has no such sentinel"):
        encode_source(tokenizer, "a <extra_id_6>", 6)
    with pytest.raises(DataError, match=r"prompt 'a \[unused0\]': write <extra_id_0>, <extra_id_1>, \.\.\. where text"):
        encode_source(tokenizer, "a [unused0]", 6)
    with pytest.raises(DataError, match="a sentinel stands twice"):
        encode_source(tokenizer, "<extra_id_0> a <extra_id_0>", 6)
    with pytest.raises(DataError, match="the tokenizer has no 7 sentinels"):
        encode_source(tokenizer, "a <extra_id_0>", 7)
    without = load_tokenizer(make_tokenizer(tmp_path / "without", "byte_bpe"))
    with pytest.raises(DataError, match="the tokenizer has no 2 sentinels"):
        encode_source(without, "a <extra_id_0>", 2)
