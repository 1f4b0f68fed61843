"""Responses alone count: labels of packed rows against a loop over the examples; documents that stay whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from data_tools import inspect_shards
from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import PADDING_POSITION, Batch
from neomoba_dist.data.chat import Dialogue, encode_pair
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.train.assemble import Corpora, open_corpora
from tests.chats import pairs, shared_chats
from tests.runs import run_config, shared_corpus

LENGTH = 96
Document = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def chats() -> Corpus:
    return open_corpus(shared_chats())


@pytest.fixture(scope="module")
def examples(chats: Corpus) -> list[Dialogue]:
    tokenizer = chats.tokenizer()
    return [encode_pair(pair["prompt"], pair["response"], tokenizer) for pair in pairs()]


def stream(*sources: Source, **changes: Any) -> UpdateStream:
    settings = DataConfig(train="", packing="whole", max_documents_per_row=16, cache=None, prefetch=0)
    layout = {"objective": "clm", "sequence_length": LENGTH, "micro_batch_size": 1, "accumulation": 2, "seed": 3}
    return UpdateStream(list(sources), replace(settings, **changes), **layout)  # type: ignore[arg-type]


def documents(batch: Batch) -> list[Document]:
    """(ids, labels) of every document of a batch."""
    found = []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        if stop > start and batch.position_ids[start] != PADDING_POSITION:
            found.append((tuple(batch.input_ids[start:stop].tolist()), tuple(batch.labels[start:stop].tolist())))
        elif stop > start:
            assert (batch.labels[start:stop] == -100).all()
    return found


def expected(examples: list[Dialogue], length: int) -> Counter[Document]:
    """By a loop: the next token where it lies in the response."""
    found: Counter[Document] = Counter()
    for example in examples:
        ((start, stop),) = example.spans
        targets = [token if start <= i < stop else -100 for i, token in enumerate(example.ids)]
        labels = [*targets[1:], -100]
        if len(example.ids) <= length:
            found[tuple(example.ids), tuple(labels)] += 1
    return found


def test_every_example_once_whole_and_its_response_alone_counts(chats: Corpus, examples: list[Dialogue]) -> None:
    rows = stream(Source(chats))
    batches = [batch for updates, _ in islice(rows, rows.rows_in_epoch // 2) for batch in updates]
    contents = {int(batch.row_ids[0]): (batch, documents(batch)) for batch in batches}.values()
    wanted = expected(examples, LENGTH)
    found = Counter(document for _, inside in contents for document in inside)
    missing = sum((wanted - found).values())
    assert not found - wanted
    assert missing <= 16 * (rows.rows_in_epoch % 2)  # the row of an odd number that the loop above has not taken
    assert len(wanted) > 50
    assert len(expected(examples, 10**6)) > len(wanted)  # longer ones are left out
    for batch, inside in contents:
        assert batch.local_valid() == sum(label >= 0 for _, labels in inside for label in labels) > 0
    updates, _ = next(iter(rows))
    assert updates[0].num_valid == sum(batch.local_valid() for batch in updates)


def test_beside_a_corpus_of_texts_all_of_which_count(chats: Corpus, examples: list[Dialogue]) -> None:
    texts = open_corpus(shared_corpus())
    index = replace(texts.index, tokenizer=chats.index.tokenizer)
    other = Corpus(texts.name, index, texts.key, None, 4)
    wanted = expected(examples, LENGTH)
    mixed = stream(Source(chats, Fraction(1)), Source(other, Fraction(1)))
    of_chats = of_texts = 0
    for updates, _ in islice(mixed, 10):
        for ids, labels in (document for batch in updates for document in documents(batch)):
            if (ids, labels) in wanted:
                of_chats += 1
            else:
                assert labels == (*ids[1:], -100)
                of_texts += 1
    assert min(of_chats, of_texts) > 10


def test_marks_of_any_runs(chats: Corpus) -> None:
    tokens = chats.tokens
    every = np.zeros(tokens, bool)
    chats.mark_counted(np.array([0]), np.array([tokens]), every, np.array([0]))
    generator = np.random.default_rng(0)
    starts = generator.integers(0, tokens - 60, 50)
    lengths = generator.integers(1, 60, 50)
    places = np.arange(50) * 60
    found = np.zeros(3000, bool)
    chats.mark_counted(starts, lengths, found, places)
    for start, length, place in zip(starts, lengths, places, strict=True):
        assert (found[place : place + length] == every[start : start + length]).all()
        assert not found[place + length : place + 60].any()
    assert 0 < every.sum() < tokens


def test_refused_and_told(chats: Corpus, examples: list[Dialogue]) -> None:
    with pytest.raises(DataError, match=r"at most 4 \(neomoba\.phase\.sequence_length\)"):
        UpdateStream(
            [Source(chats)], DataConfig(train="", packing="whole", cache=None), objective="clm", sequence_length=4,
            micro_batch_size=1, accumulation=1, seed=1,
        )  # fmt: skip
    (line,) = Corpora([Source(chats)], None, None, LENGTH).lines()
    count = sum((expected(examples, 10**6) - expected(examples, LENGTH)).values())
    assert f"{chats.documents} documents, {count} of them left out: longer than neomoba.phase.sequence_length" in line
    config = run_config({})
    with pytest.raises(DataError, match=r"neomoba\.model\.objective is mlm; start from a decoder with --init_from"):
        open_corpora(replace(config, data=replace(config.data, train=chats.name)))


def test_inspect_shards_counts_what_the_loss_counts(
    chats: Corpus, examples: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    counted = sum(stop - start for example in examples for start, stop in example.spans)
    assert chats.counted_tokens == counted < chats.index.tokens
    inspect_shards.main([str(chats.folder), "--objective", "clm", "--rows", "1"])
    said = f"\n{counted} tokens count for the loss, {counted / chats.index.tokens:.1%}: the responses\n"
    assert said in capsys.readouterr().out
    everything = open_corpus(shared_corpus())
    assert everything.counted_tokens == everything.index.tokens
