"""Filling a sample to its length: tokens counted by words, sizes found by a search that ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from evals.cli import EvalError
from evals.ruler.sets import Draft

if TYPE_CHECKING:
    from neomoba_dist.data.tokenizer import Tokenizer

MOST_WORDS_HELD = 500_000
ENOUGH = 0.995  # of the length: the search ends there
_WORD = re.compile(r"\s*\S+|\s+$")


class TooShort(EvalError):
    """A length in which a sample's needles and question alone do not fit."""


class TokenCounter:
    """Tokens of long texts. Where a tokenizer begins anew at white space, each word is encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from neomoba_dist.data.tokenizer import HuggingFaceTokenizer

        self._tokenizer = tokenizer
        # what allows these tokenizers to be cut at line ends is that they begin a new match at any white space
        self._by_word = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.splits_at_line_ends
        self._held: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """len(tokenizer.encode(text))."""
        if not self._by_word:
            return len(self._tokenizer.encode(text))
        words, held = _WORD.findall(text), self._held
        new = list({word for word in words if word not in held})
        if new:
            if len(held) + len(new) > MOST_WORDS_HELD:
                held.clear()
                new = list(set(words))
            held.update(zip(new, map(len, self._tokenizer.encode_batch(new)), strict=True))
        return sum(map(held.__getitem__, words))


def fit(draft: Draft, length: int, reserved: int, count: TokenCounter, guess: int) -> tuple[str, int, int]:
    """(prompt, its tokens, its size): as long as `length` - `reserved` tokens allow.

    The search stops at ENOUGH of the length, or where one unit more would be too much. guess: a size to begin with.
    Raises TooShort where the least does not fit.
    """
    budget, enough, aim = length - reserved, length * ENOUGH - reserved, length * (1 + ENOUGH) / 2 - reserved
    text = draft.compose(draft.least)
    least = tokens = count(text)
    if tokens > budget:
        raise TooShort(f"a sample takes at least {tokens + reserved:,} tokens")
    best, low, high, rounds = (text, tokens, draft.least), draft.least, 0, 0
    size = max(guess, low + 1)
    while best[1] < enough and high - low != 1:
        text = draft.compose(size)
        tokens, rounds = count(text), rounds + 1
        if tokens <= budget:
            best, low = (text, tokens, size), size
        else:
            high = size
        if rounds < 8:  # nearly a straight line
            slope = max(tokens - least, 1) / (size - draft.least)
            size = draft.least + int((aim - least) / slope)
        else:
            size = (low + high) // 2 if high else 2 * low
        size = max(size, low + 1)
        if high:
            size = min(size, high - 1)
    return best
