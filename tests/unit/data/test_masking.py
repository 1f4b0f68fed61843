"""Masks and labels: rates, what may never be chosen, dependence on (seed, row) only, whole words, token dropout."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from neomoba_dist.data.counter import CHOICES, Counter
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.masking import MaskedLanguageModel, TokenDropout, WordTable, next_token_labels
from neomoba_dist.data.rows import RowBlock
from neomoba_dist.data.tokenizer import load_tokenizer
from neomoba_dist.data.words import word_table
from tests.corpora import make_tokenizer

VOCAB, SPECIAL, MASK = 120, 20, 4
ORDINARY = np.arange(VOCAB) >= SPECIAL


def _block(tokens: np.ndarray, row_ids: list[int], pieces: list[tuple[int, int]] | None = None) -> RowBlock:
    """Rows of equal length; `pieces` (start, length), one per row if not given."""
    length = len(tokens) // len(row_ids)
    pieces = pieces or [(i * length, length) for i in range(len(row_ids))]
    start, size = (np.array(column, np.int64) for column in zip(*pieces, strict=True))
    return RowBlock(tokens.astype(np.uint16), np.array(row_ids, np.int64), start, size, 0, {})


def _tokens(length: int = 200_000) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCAB, length)


def _masks(**changes: object) -> MaskedLanguageModel:
    settings: dict = {"seed": 3, "probability": 0.2, "scheme": "80/10/10", "mask_id": MASK, "ordinary": ORDINARY}
    return MaskedLanguageModel(**settings | changes)


def _apply(masks: MaskedLanguageModel, block: RowBlock) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = block.tokens_T.astype(np.int64), np.full(len(block.tokens_T), -100)
    assert masks.apply(block, inputs, labels) == (labels != -100).sum()
    return inputs, labels


@pytest.mark.parametrize("probability", [0.15, 0.2, 0.3])
def test_rates_of_80_10_10(probability: float) -> None:
    tokens = _tokens()
    input_ids, labels = _apply(_masks(probability=probability), _block(tokens, [11, 12]))
    ordinary = ORDINARY[tokens]
    chosen = labels != -100
    count = chosen.sum()
    # five standard deviations of the binomial
    n = ordinary.sum()
    assert abs(count - probability * n) < 5 * np.sqrt(n * probability * (1 - probability))
    masked = (input_ids == MASK) & chosen
    changed = chosen & ~masked & (input_ids != tokens)
    for share, expected in ((masked.sum() / count, 0.8), (changed.sum() / count, 0.1 * (1 - 1 / ORDINARY.sum()))):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    # random ids: only ordinary ones, and all of them about equally often
    drawn = np.bincount(input_ids[changed], minlength=VOCAB)
    assert drawn[:SPECIAL].sum() == 0
    expected_draws = changed.sum() / ORDINARY.sum()
    assert drawn[SPECIAL:].min() > 0
    assert drawn.max() < expected_draws + 6 * np.sqrt(expected_draws)


@pytest.mark.parametrize("scheme", ["80/10/10", "all"])
def test_labels_and_untouched_tokens(scheme: str) -> None:
    tokens = _tokens(20_000)
    input_ids, labels = _apply(_masks(scheme=scheme), _block(tokens, [5]))
    chosen = labels != -100
    assert (labels[chosen] == tokens[chosen]).all()
    assert (input_ids[~chosen] == tokens[~chosen]).all()
    assert not (chosen & ~ORDINARY[tokens]).any()
    if scheme == "all":
        assert (input_ids[chosen] == MASK).all()


def test_a_mask_is_a_function_of_seed_and_row() -> None:
    tokens = _tokens(4096)
    masks = _masks()
    first = _apply(masks, _block(tokens, [9]))
    _apply(masks, _block(tokens, [10]))
    again = _apply(masks, _block(tokens, [9]))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    # alone or among other rows
    several = _apply(_masks(), _block(np.tile(tokens, 3), [4, 9, 1 << 60]))
    assert all(np.array_equal(a, b[4096:8192]) for a, b in zip(first, several, strict=True))
    assert not np.array_equal(first[1], _apply(masks, _block(tokens, [10]))[1])
    assert not np.array_equal(first[1], _apply(_masks(seed=4), _block(tokens, [9]))[1])


def test_the_drawn_masks_never_change() -> None:
    """Pinned: a resumed run draws the masks of the run it continues, whatever the version of numpy."""
    assert Counter(3, CHOICES).words(1, 2).tolist() == [13652367922584412156, 15649216603714737163]
    input_ids, labels = _apply(_masks(probability=0.6), _block(np.arange(100, 116), [1]))
    assert input_ids.tolist() == [*range(100, 105), 4, 4, *range(107, 114), 4, 4]
    assert np.flatnonzero(labels != -100).tolist() == [5, 6, 8, 9, 14, 15]


def test_padding_is_never_masked_even_with_an_ordinary_id() -> None:
    """A tokenizer without special tokens pads with an ordinary id."""
    everything = np.ones(VOCAB, bool)
    tokens = np.zeros(4000, np.int64)
    block = _block(tokens, [1, 2], [(0, 500), (600, 400), (2000, 1)])
    _, labels = _apply(_masks(ordinary=everything, probability=0.9), block)
    where = np.flatnonzero(labels != -100)
    assert len(where) > 700
    assert all(w < 500 or 600 <= w < 1000 or w == 2000 for w in where.tolist())


def test_whole_words_are_chosen_together() -> None:
    rng = np.random.default_rng(0)
    continues = rng.random(VOCAB) < 0.5
    continues[:SPECIAL] = False
    words = WordTable(continues, np.arange(VOCAB) >= SPECIAL)
    tokens = _tokens(60_000)
    block = _block(tokens, [1, 2], [(0, 20_000), (20_000, 10_000), (30_000, 30_000)])
    _, labels = _apply(_masks(words=words), block)
    chosen = labels != -100
    ordinary = ORDINARY[tokens]
    assert abs(chosen.sum() / ordinary.sum() - 0.2) < 0.02
    inside = continues[tokens]
    inside[1:] &= ORDINARY[tokens[:-1]]
    inside[[0, 20_000, 30_000]] = False
    both = np.flatnonzero(inside & ordinary)
    assert len(both) > 10_000
    assert (chosen[both] == chosen[both - 1]).all()
    # but not over the border of a document
    borders = [b for b in (20_000, 30_000) if ordinary[b] and ordinary[b - 1]]
    assert all(bool(words.starts(block)[b]) for b in borders)
    plain = _apply(_masks(), block)[1] != -100
    assert not np.array_equal(plain, chosen)


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram", "bpe"])
def test_words_of_real_vocabularies(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind))
    table = word_table(tokenizer)
    text = "The internationalisation of café-culture, v2: isinstance(handler, Handlers) \u4f60\u597d"
    ids = np.array(tokenizer.wrap_document(tokenizer.encode(text)))
    starts = np.flatnonzero(table.starts(_block(ids, [0])))
    words = [tokenizer.decode(ids[a:b]).strip() for a, b in pairwise([*starts.tolist(), len(ids)])]
    lower = [word.lower() for word in words]
    for expected in ("internationalisation", "culture", ",", "isinstance", "(", "handlers", ")"):
        assert expected in lower, (expected, words)
    assert len(starts) < len(ids) - 8


def test_token_dropout_hides_without_labels() -> None:
    tokens = _tokens(100_000)
    block = _block(tokens, [1, 2])
    inputs = tokens.copy()
    keep = np.arange(len(tokens)) % 2 == 0
    TokenDropout(3, 0.1, MASK, ORDINARY).apply(block, inputs, keep)
    hidden = inputs != tokens
    assert (inputs[hidden] == MASK).all()
    assert not (hidden & keep).any()
    assert not (hidden & ~ORDINARY[tokens]).any()
    open_to_it = (ORDINARY[tokens] & ~keep).sum()
    assert abs(hidden.sum() - 0.1 * open_to_it) < 5 * np.sqrt(0.09 * open_to_it)


def test_next_token_labels_stop_at_documents() -> None:
    tokens = np.array([2, 7, 8, 3, 2, 9, 3, 0, 0, 5, 6, 1, 1, 4, 0, 0, 0, 0])
    labels = np.empty(len(tokens), np.int64)
    block = _block(tokens, [0, 1], [(0, 4), (4, 3), (9, 2), (13, 1)])
    assert next_token_labels(block, labels) == 6
    expected = [7, 8, 3, -100, 9, 3, -100, -100, -100, 6, *[-100] * 8]
    assert labels.tolist() == expected


@pytest.mark.parametrize("bad", [{"scheme": "90/5/5"}, {"probability": 0.0}, {"probability": 1.0}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(DataError, match="mlm_"):
        _masks(**bad)
