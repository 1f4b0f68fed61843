"""Mixtures and curricula: shares of corpora, subsets by length, packing options, on any number of ranks."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import PADDING_POSITION, Batch
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.prefetch import prefetch
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from tests.corpora import make_corpus

LENGTH = 256


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """Two corpora of one tokenizer; the second in smaller shards, in another folder."""
    return tuple(  # type: ignore[return-value]
        make_corpus(tmp_path_factory.mktemp("corpus"), shard_bytes=size) for size in (200_000, 90_000)
    )


def _mixture(corpora: tuple[Corpus, Corpus]) -> list[Source]:
    first, second = corpora
    return [Source(first, Fraction(1, 5)), Source(first, Fraction(2, 5), 1024), Source(second, Fraction(2, 5), 2048)]


def _stream(sources: list[Source], *, layout: dict[str, Any] | None = None, **settings: Any) -> UpdateStream:
    shape: dict[str, Any] = {"objective": "mlm", "sequence_length": LENGTH, "micro_batch_size": 1, "accumulation": 8}
    config = DataConfig(**{"train": "", "cache": None, "prefetch": 0, "max_documents_per_row": 16, **settings})
    return UpdateStream(sources, config, seed=5, **shape | (layout or {}))


def _digest(batches: list[Batch]) -> dict[int, bytes]:
    """Row id -> all its bytes."""
    found = {}
    for batch in batches:
        for i, row_id in enumerate(batch.row_ids.tolist()):
            row = slice(i * batch.length, (i + 1) * batch.length)
            parts = (batch.input_ids, batch.labels, batch.position_ids)
            found[row_id] = b"".join(part[row].numpy().tobytes() for part in parts)
    return found


def _originals(batch: Batch) -> torch.Tensor:
    return torch.where(batch.labels >= 0, batch.labels, batch.input_ids)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_updates_are_byte_equal_for_any_ranks_and_any_prefetch(
    corpora: tuple[Corpus, Corpus], dp_size: int, depth: int
) -> None:
    options = {"shuffle_shards": 2, "mlm_whole_word": True, "token_dropout": 0.05, "align": 16}
    reference = [_digest(batches) for batches, _ in islice(_stream(_mixture(corpora), **options), 25)]
    ranks = [
        _stream(
            _mixture(corpora),
            layout={"dp_rank": rank, "dp_size": dp_size, "accumulation": 8 // dp_size},
            prefetch=depth,
            **options,
        )
        for rank in range(dp_size)
    ]
    iterators = [iter(stream) for stream in ranks]
    for expected in reference:
        shares = [next(iterator) for iterator in iterators]
        assert len({json.dumps(state) for _, state in shares}) == 1
        assert _digest([batch for batches, _ in shares for batch in batches]) == expected
    for iterator in iterators:
        iterator.close()


def test_sources_give_their_shares_and_every_row_once_an_epoch(corpora: tuple[Corpus, Corpus]) -> None:
    stream = _stream(_mixture(corpora), layout={"accumulation": 1})
    rows = [reader.plan.rows for reader in stream.rows.readers]
    ends = np.cumsum(rows)
    taken: list[int] = []
    for number, (batches, state) in enumerate(islice(stream, 3 * max(rows)), start=1):
        taken += batches[0].row_ids.tolist()
        assert state["rows"] == number
    sources = np.searchsorted(ends, np.array(taken) % ends[-1], side="right")
    for source, share in enumerate((0.2, 0.4, 0.4)):
        counts = np.cumsum(sources == source)
        assert np.abs(counts - share * np.arange(1, len(taken) + 1)).max() < 1
        own = [row for row, s in zip(taken, sources, strict=True) if s == source]
        for epoch in range(len(own) // rows[source]):
            part = own[epoch * rows[source] : (epoch + 1) * rows[source]]
            assert len(set(part)) == rows[source]
            assert {row // ends[-1] for row in part} == {epoch}
    assert len(set(taken)) == len(taken)


def test_subsets_take_long_documents_only(corpora: tuple[Corpus, Corpus]) -> None:
    corpus = corpora[0]
    stream = _stream([Source(corpus, min_length=1024)], layout={"objective": "clm", "accumulation": 1})
    plan = stream.rows.readers[0].plan
    least, documents, tokens = corpus.index.subsets[0]
    assert (least, documents, tokens) == (1024, int(plan.totals[1]), int(plan.totals[0]))
    batches = [b for update, _ in islice(stream, plan.rows) for b in update]
    kept = corpus.document_lengths >= 1024
    ids = corpus.tokens_at(0, corpus.tokens)[np.repeat(kept, corpus.document_lengths)]
    seen = torch.cat([b.input_ids[b.position_ids >= 0] for b in batches])
    assert Counter(seen.tolist()) == Counter(ids.tolist())


@pytest.mark.parametrize("options", [{"packing": "concat"}, {"align": 64}, {"packing": "concat", "align": 64}])
def test_every_token_is_in_one_row_of_an_epoch(corpora: tuple[Corpus, Corpus], options: dict[str, Any]) -> None:
    corpus = corpora[0]
    stream = _stream([Source(corpus)], layout={"objective": "mlm", "accumulation": 1}, **options)
    align = options.get("align", 1)
    seen = []
    for update, _ in islice(stream, stream.rows_in_epoch):
        (batch,) = update
        starts = torch.nonzero(batch.position_ids == 0).flatten()
        assert (starts % align == 0).all()
        borders = set(batch.cu_seqlens.tolist())
        assert borders >= set(starts.tolist())
        padding = batch.position_ids == PADDING_POSITION
        assert (batch.labels[padding] == -100).all()
        assert (batch.input_ids[padding] == corpus.special.padding).all()
        # a run of padding is a document of its own
        edges = torch.nonzero(padding.diff()).flatten() + 1
        assert set(edges.tolist()) <= borders
        seen.append(_originals(batch)[~padding])
    assert Counter(torch.cat(seen).tolist()) == Counter(corpus.tokens_at(0, corpus.tokens).tolist())
    pads = stream.rows_in_epoch * LENGTH - corpus.tokens
    assert stream.padding_share == pytest.approx(pads / (stream.rows_in_epoch * LENGTH))
    if options == {"packing": "concat"}:
        assert stream.padding_share < 0.01


def test_a_curriculum_of_lengths_and_larger_updates(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    """Phases of 64, 256 and 1024 tokens, each on longer documents; in the last one the update grows half way."""
    cache = str(tmp_path)
    for length, least in ((64, 0), (256, 1024), (1024, 2048)):
        stream = _stream(
            [Source(corpora[0], min_length=least)], layout={"sequence_length": length, "accumulation": 2}, cache=cache
        )
        batches, state = next(iter(stream))
        assert batches[0].length == length
        assert len(json.dumps(state)) < 1000
    larger = _stream(
        [Source(corpora[0], min_length=2048)], layout={"sequence_length": 1024, "accumulation": 6}, cache=cache
    )
    larger.load_state_dict(state)
    one = _stream([Source(corpora[0], min_length=2048)], layout={"sequence_length": 1024, "accumulation": 1})
    order = [int(b[0].row_ids) for b, _ in islice(one, 8)]
    after, state = next(iter(larger))
    assert [int(batch.row_ids) for batch in after] == order[2:]
    assert state["rows"] == 8
    assert len(list((tmp_path / "plans").iterdir())) == 3


def test_a_resume_late_in_the_epoch_starts_at_once(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": str(tmp_path), "prefetch": 2}
    whole = _stream(_mixture(corpora), **options)
    states = [state for _, state in islice(whole, int(0.9 * whole.rows_in_epoch / 8))]
    expected, _ = next(iter(whole))
    began = time.perf_counter()
    resumed = _stream(
        [Source(open_corpus(s.corpus.folder), s.weight, s.min_length) for s in whole.rows.sources], **options
    )
    resumed.load_state_dict(json.loads(json.dumps(states[-1])))
    batches, _ = next(iter(resumed))
    assert time.perf_counter() - began < 1
    assert _digest(batches) == _digest(expected)


def test_other_data_are_refused_unless_allowed(corpora: tuple[Corpus, Corpus]) -> None:
    state = _stream(_mixture(corpora)).state_dict()
    for changed in (
        [Source(corpora[0])],
        [*_mixture(corpora)[:2], Source(corpora[1], Fraction(2, 5), 1024)],
        [*_mixture(corpora)[:2], Source(corpora[1], Fraction(1, 5), 2048)],
    ):
        with pytest.raises(DataError, match=r"is not the data of the checkpoint .* --allow-data-change"):
            _stream(changed).load_state_dict(state)
    with pytest.raises(DataError, match=r"neomoba.data.align is 32, .* drawn with 1"):
        _stream(_mixture(corpora), align=32).load_state_dict(state)
    stream = _stream([Source(corpora[0])], align=32)
    stream.load_state_dict({**state, "rows": 24}, allow_data_change=True)
    assert stream.rows_consumed == 24
    assert next(iter(stream))[1]["rows"] == 32


def test_impossible_mixtures_are_refused(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    first, second = corpora
    with pytest.raises(DataError, match="has no document of 1000000 tokens or more"):
        _stream([Source(first), Source(second, min_length=1_000_000)])
    rows = _stream([Source(second, min_length=8192)]).rows_in_epoch
    with pytest.raises(DataError, match=rf"gives {rows} rows of 256 tokens, fewer than the \d+ of one update"):
        _stream([Source(first), Source(second, min_length=8192)], layout={"accumulation": 2 * rows + 2})
    other = make_corpus(tmp_path, kind="wordpiece")
    with pytest.raises(DataError, match="were made with different tokenizers"):
        _stream([Source(first), Source(other)])


def test_prefetch_works_ahead_and_stops() -> None:
    made: list[int] = []

    def numbers() -> Any:
        for i in itertools.count():
            made.append(i)
            yield i

    before = threading.active_count()
    with prefetch(numbers(), 3) as items:
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2]
        assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    assert threading.active_count() == before
    assert len(made) <= 9

    def failing() -> Any:
        yield 1
        raise DataError("shard-7 is cut")

    with prefetch(failing(), 2) as items:
        assert next(items) == 1
        with pytest.raises(DataError, match="shard-7"):
            next(items)
    with prefetch(iter([1, 2]), 1) as items:
        assert list(items) == [1, 2]
