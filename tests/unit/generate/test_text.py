"""Ids of a continuation as text after its prompt."""

from pathlib import Path

import pytest

from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from neomoba_dist.generate.text import continued_text
from tests.corpora import make_tokenizer


def load(folder: Path, kind: str) -> Tokenizer:
    return load_tokenizer(make_tokenizer(folder, kind))


@pytest.mark.parametrize(
    ("prompt", "following", "expected"),
    [
        ("It was the best", ["the", "the"], "It was the best the the"),
        ("It was the best ", ["the"], "It was the best the"),
        ("return text", ["##s"], "return texts"),
        ("", ["the", "text"], "the text"),
        ("It was", [], "It was"),
    ],
)
def test_wordpiece(tmp_path: Path, prompt: str, following: list[str], expected: str) -> None:
    tokenizer = load(tmp_path, "wordpiece")
    ids = [tokenizer.id_of(token) for token in following]
    assert None not in ids
    assert continued_text(tokenizer, prompt, [i for i in ids if i is not None]) == expected


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram"])
@pytest.mark.parametrize(
    ("prompt", "following"),
    [("It was the best", " the text"), ("It was the best ", "the text"), ("pass", "key = 1"), ("caf", "\u00e9\n  x")],
)
def test_tokenizers_that_keep_white_space(tmp_path: Path, kind: str, prompt: str, following: str) -> None:
    tokenizer = load(tmp_path, kind)
    assert continued_text(tokenizer, prompt, tokenizer.encode(following)) == prompt + following
