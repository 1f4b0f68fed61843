"""Pairs for next-sentence prediction: what changes in a row and what does not, labels, and what they depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from neomoba_dist.config import DataConfig
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import RowBlock, Source
from neomoba_dist.data.sentence_pairs import IS_NEXT, LEAST_DOCUMENT, LEAST_TOKENS, NOT_NEXT, SentencePairs
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.tokenizer import SpecialIds
from neomoba_dist.data.validation import validation_batches
from tests.corpora import make_corpus

CLS, SEP = 2, 3
SPECIAL = SpecialIds(pad=0, unk=1, cls=CLS, sep=SEP, mask=4)
LENGTH = 256
ROW = 4096  # tokens of a row of real text


def rows_of(documents: list[list[int]], first_id: int = 10, begins: int = CLS) -> RowBlock:
    """Rows of documents of these lengths; every ordinary token occurs once, so that a token tells its document."""
    tokens = np.zeros(len(documents) * LENGTH, np.uint32)
    start, size, word = [], [], 100
    for row, lengths in enumerate(documents):
        place = row * LENGTH
        for length in lengths:
            inner = np.arange(word, word + length - 2)
            tokens[place : place + length] = [begins, *inner, SEP]
            start.append(place)
            size.append(length)
            place, word = place + length, word + length
    ids = np.arange(first_id, first_id + len(documents))
    return RowBlock(tokens, ids, np.array(start, np.int64), np.array(size, np.int64), 0, {})


def make(block: RowBlock, seed: int = 1) -> tuple[RowBlock, np.ndarray, np.ndarray]:
    """The pairs, token types and labels."""
    types, labels = np.zeros(len(block.tokens_T), np.int64), np.full(len(block.tokens_T), -100)
    before = block.tokens_T.copy()
    made = SentencePairs(seed, SPECIAL, "corpus").apply(block, types, labels)
    assert np.array_equal(block.tokens_T, before), "rows may be read again"
    return made, types, labels


def many_rows(count: int = 400) -> RowBlock:
    draw = np.random.default_rng(5)
    return rows_of([draw.integers(3, 60, draw.integers(1, 5)).tolist() for _ in range(count)])


def test_what_a_pair_is() -> None:
    block = many_rows()
    made, types, labels = make(block)
    document_of = {int(token): number for number, token in enumerate(block.tokens_T) if token >= 100}
    seen: Counter[int] = Counter()
    for start, length in zip(made.piece_start.tolist(), made.piece_length.tolist(), strict=True):
        piece, kinds = made.tokens_T[start : start + length].tolist(), types[start : start + length].tolist()
        before, label = block.tokens_T[start : start + length].tolist(), int(labels[start])
        assert set(labels[start + 1 : start + length]) <= {-100}
        row = start // LENGTH
        long_enough = [n for n, at in zip(block.piece_length, block.piece_start, strict=True) if at // LENGTH == row]
        alone = sum(n >= LEAST_DOCUMENT for n in long_enough) < 2
        assert (label == -100) == (length < LEAST_DOCUMENT or alone)
        if label == -100:
            assert piece == before
            assert not any(kinds)
            continue
        cut = kinds.index(1)
        assert kinds == [0] * cut + [1] * (length - cut)
        assert piece[0] == CLS
        assert piece[cut - 1] == piece[-1] == SEP
        first, second = piece[1 : cut - 1], piece[cut:]
        assert min(len(first), len(second)) >= LEAST_TOKENS
        assert piece[:cut] == [*before[: cut - 1], SEP], "A stays where it was"
        if label == IS_NEXT:
            assert second == before[cut:], "B goes on after the token that became the separator"
        else:
            assert label == NOT_NEXT
            others = {document_of[token] for token in second[:-1]}
            assert not others & set(range(start, start + length)), "B is another document's"
            assert min(others) // LENGTH == row
            assert max(others) - min(others) == len(others) - 1, "and in one piece"
        seen[label] += 1
    total = seen.total()
    assert total > 400
    assert abs(seen[NOT_NEXT] / total - 0.5) < 5 * 0.5 * np.sqrt(2.5 / total), "coins are thrown for two or three"


def test_tokens_of_a_row_stay() -> None:
    """But for those that became separators: as many as there are pairs."""
    block = many_rows(50)
    made, _, labels = make(block)
    for row in range(50):
        here = slice(row * LENGTH, (row + 1) * LENGTH)
        pairs = int((labels[here] != -100).sum())
        before, after = Counter(block.tokens_T[here].tolist()), Counter(made.tokens_T[here].tolist())
        assert after - before == ({SEP: pairs} if pairs else {})
        assert (before - after).total() == pairs
        assert set((before - after).values()) <= {1}
    assert made.piece_start is block.piece_start
    assert made.piece_length is block.piece_length


def test_neither_length_says_the_label() -> None:
    """Of two documents of very different length both labels come with the same cuts."""
    blocks = [make(rows_of([[30, 120]], first_id=number)) for number in range(3000)]
    cuts: dict[int, list[int]] = {IS_NEXT: [], NOT_NEXT: []}
    for _, types, labels in blocks:
        assert labels[0] == labels[30]
        assert types[:30].sum() == types[30:].sum()
        cuts[int(labels[0])].append(int(types[:30].sum()))
    for found in cuts.values():
        assert {min(found), max(found)} == {LEAST_TOKENS, 30 - LEAST_TOKENS - 2}
    deviation = np.std(cuts[IS_NEXT]) * np.sqrt(4 / 3000)
    assert abs(np.mean(cuts[IS_NEXT]) - np.mean(cuts[NOT_NEXT])) < 5 * deviation


def test_pairs_depend_on_seed_and_row_alone() -> None:
    block = rows_of([[40, 50, 60, 90]] * 6)
    whole, types, labels = make(block)
    for first, last in ((0, 2), (2, 6)):
        part, some_types, some_labels = make(block.rows(first, last))
        here = slice(first * LENGTH, last * LENGTH)
        assert np.array_equal(part.tokens_T, whole.tokens_T[here])
        assert np.array_equal(some_types, types[here])
        assert np.array_equal(some_labels, labels[here])
    assert not np.array_equal(make(block, seed=2)[1], types)
    assert not np.array_equal(types[:LENGTH], types[LENGTH : 2 * LENGTH])


def test_documents_without_cls_stay() -> None:
    """As pieces of a document that was cut, which begin anywhere."""
    block = rows_of([[60, 60, 60]], begins=77)
    made, types, labels = make(block)
    assert np.array_equal(made.tokens_T, block.tokens_T)
    assert not types.any()
    assert set(labels) == {-100}


@pytest.mark.parametrize("missing", ["cls", "sep"])
def test_a_tokenizer_without_borders_is_refused(missing: str) -> None:
    with pytest.raises(DataError, match=r"corpus: its tokenizer has no \[CLS\] and \[SEP\], between which"):
        SentencePairs(1, replace(SPECIAL, **{missing: None}), "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("pairs"), "wordpiece")


def stream(corpus: Corpus, **layout: int) -> UpdateStream:
    settings = DataConfig(train="unused", cache=None, prefetch=0, token_dropout=0.1)
    shape = {"micro_batch_size": 1, "accumulation": 4, "sequence_length": ROW, "seed": 7, "objective": "mlm"}
    return UpdateStream([Source(corpus)], settings, pairs=True, **shape | layout)  # type: ignore[arg-type]


def test_batches_of_real_text(corpus: Corpus) -> None:
    """Masks lie in the pairs as they now stand; layouts and a resume change nothing; counts are those of the update."""
    updates = [batches for batches, _ in islice(stream(corpus), 6)]
    special = corpus.special
    assert sum(batches[0].num_pairs for batches in updates) > 20
    for batches in updates:
        assert {batch.num_pairs for batch in batches} == {
            sum(int((batch.next_sentence_labels >= 0).sum()) for batch in batches)  # type: ignore[operator]
        }
        for batch in batches:
            assert batch.token_type_ids is not None
            assert batch.next_sentence_labels is not None
            tokens = batch.input_ids.where(batch.labels < 0, batch.labels)
            first = (batch.next_sentence_labels >= 0).nonzero().flatten()
            assert (batch.position_ids[first] == 0).all()
            assert (tokens[first] == special.cls).all()
            starts = ((batch.token_type_ids == 1) & (batch.token_type_ids.roll(1) == 0)).nonzero().flatten()
            assert len(starts) == len(first)
            assert (batch.input_ids[starts - 1] == special.sep).all()
            assert (batch.labels[starts - 1] == -100).all()

    ranks = [list(islice(stream(corpus, accumulation=2, dp_rank=rank, dp_size=2), 2)) for rank in (0, 1)]
    again = stream(corpus)
    again.load_state_dict(ranks[0][0][1])
    for whole, (first, _), (second, _) in zip(updates, *ranks, strict=False):
        dealt = [batch for both in zip(first, second, strict=True) for batch in both]
        for one, other in zip(whole, dealt, strict=True):
            for name in ("input_ids", "labels", "token_type_ids", "next_sentence_labels"):
                assert getattr(one, name).equal(getattr(other, name))
    (resumed, _) = next(iter(again))
    assert all(one.input_ids.equal(other.input_ids) for one, other in zip(resumed, updates[1], strict=True))


def test_validation_has_pairs(corpus: Corpus) -> None:
    settings = DataConfig(train="unused", cache=None)
    shape = {"objective": "mlm", "sequence_length": ROW, "micro_batch_size": 2, "rows": 15}
    batches = validation_batches(corpus, settings, pairs=True, **shape)  # type: ignore[arg-type]
    assert sum(batch.num_pairs for batch in batches) > 5
    last = batches[-1]
    assert last.next_sentence_labels is not None
    assert (last.next_sentence_labels[ROW:] == -100).all(), "a row of padding"
    plain = validation_batches(corpus, settings, **shape)  # type: ignore[arg-type]
    assert plain[0].token_type_ids is None
    assert plain[0].num_pairs == 0
