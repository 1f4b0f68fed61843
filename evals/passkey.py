"""The passkey prompts of the needle task: written from real text, scored in one forward.

    [CLS] text ... The passkey is 4 8 2 1 3. Remember the passkey. ... text ...
    What is the passkey? The passkey is 4 8 2 1 3.

Apart from each other, digits are tokens of their own to WordPiece and to the large published vocabularies, in these
prompts as in texts to train on, which say the same words (`data_tools/passkeys.py`). CLM: the digits of the answer are
scored with the true ones before them (teacher forcing; all first choices right is the same as greedy decoding
right). MLM: the digits of the answer are [MASK]ed together.

Several needles have names, "passkey A", "passkey B" and so on: one is asked for, at the depth of the row; the others
lie anywhere.

Legend: R rows, L tokens in a row, K digits of the key.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data_tools.passkeys import NEEDLE, QUESTION
from evals.cli import EvalError

if TYPE_CHECKING:
    from neomoba_dist.data.batch import Batch
    from neomoba_dist.data.corpus import Corpus
    from neomoba_dist.data.tokenizer import Tokenizer


class Scorer(Protocol):
    """What the task needs of a model."""

    def choices(
        self, batch: Batch, places: Sequence[int], candidates: Sequence[int]
    ) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Prompt:
    """The pieces of a prompt as ids. digits int64 [10]: the token of each digit within a key. key_digits: K.

    needles, questions: what stands before and after the digits, one of each per name; all alike in length.
    """

    head: list[int]
    needles: list[tuple[list[int], list[int]]]
    questions: list[tuple[list[int], list[int]]]
    full_stop: int
    digits: np.ndarray
    key_digits: int
    mask: int | None

    @property
    def overhead(self) -> int:
        """Tokens that are not haystack."""
        needle = sum(map(len, self.needles[0])) + self.key_digits
        return len(self.head) + len(self.needles) * needle + sum(map(len, self.questions[0])) + self.key_digits


@dataclass(frozen=True)
class Row:
    """One prompt with its answer. tokens int64 [L]; key int64 [K], digits 0..9; answer: place of the first digit."""

    length: int
    sample: int
    depth: float
    tokens: np.ndarray
    key: np.ndarray
    answer: int


def make_prompt(tokenizer: Tokenizer, *, mask: bool, key_digits: int, needles: int = 1) -> Prompt:
    """The prompt's pieces in the tokenizer's ids. Raises EvalError if it has no token for every digit, or no mask."""
    special = tokenizer.special
    # the last id: a small vocabulary may keep the space, or SentencePiece its word-start sign, as a token of its own
    digits = [(tokenizer.encode(f"{NEEDLE[0]} {digit}") or [-1])[-1] for digit in range(10)]
    if len(set(digits)) < 10 or -1 in digits:
        raise EvalError("needle: the tokenizer has no token for each of the digits 0 to 9; leave needle out of --tasks")
    if mask and special.mask is None:
        raise EvalError("needle: the tokenizer has no mask token; leave needle out of --tasks")
    names = [""] if needles == 1 else [f" {letter}" for letter in string.ascii_uppercase[:needles]]

    def named(parts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        texts = [[part.replace("passkey", f"passkey{name}") for part in parts] for name in names]
        return [(tokenizer.encode(before), tokenizer.encode(after)) for before, after in texts]

    told, asked, sep = named(NEEDLE), named(QUESTION), [] if special.sep is None else [special.sep]
    if len({tuple(map(len, pieces)) for pieces in told}) > 1:
        raise EvalError(f"--needles {needles}: their names differ in tokens with this tokenizer; give --needles 1")
    return Prompt(
        head=[] if special.cls is None else [special.cls],
        needles=told,
        questions=[(ask, end + sep) for ask, end in asked],
        full_stop=tokenizer.encode("end.")[-1],
        digits=np.array(digits),
        key_digits=key_digits,
        mask=special.mask if mask else None,
    )


def read_text(corpus: Corpus, start: int, count: int) -> np.ndarray:
    """At most `count` ordinary tokens int64 of the corpus from token `start` on, shard after shard, once around."""
    parts: list[np.ndarray] = []
    found = seen = 0
    while found < count and seen < corpus.tokens:
        place = (start + seen) % corpus.tokens
        chunk = corpus.tokens_at(place, min(count, corpus.tokens - max(place, seen)))
        seen += len(chunk)
        parts.append(chunk[corpus.ordinary[chunk]])
        found += len(parts[-1])
    return np.concatenate(parts)[:count]


def write_row(prompt: Prompt, haystack: np.ndarray, depth: float, seed: int, sample: int) -> Row:
    """Hide a fresh key at `depth` percent, moved back to the last sentence end if one is near, and ask for it."""
    length = len(haystack) + prompt.overhead
    draw = random.Random(f"{seed}/{length}/{sample}/{depth:g}")
    keys = [np.array([draw.randrange(10) for _ in range(prompt.key_digits)]) for _ in prompt.needles]
    asked = draw.randrange(len(keys)) if len(keys) > 1 else 0
    depths = [depth if name == asked else 100 * draw.random() for name in range(len(keys))]
    pieces, last = [np.array(prompt.head)], 0
    for name in sorted(range(len(keys)), key=depths.__getitem__):
        at = max(last, _place(prompt, haystack, depths[name]))
        before, after = prompt.needles[name]
        pieces += [haystack[last:at], np.array(before), prompt.digits[keys[name]], np.array(after)]
        last = at
    ask, end = prompt.questions[asked]
    pieces += [haystack[last:], np.array(ask), prompt.digits[keys[asked]], np.array(end)]
    tokens = np.concatenate([piece.astype(np.int64) for piece in pieces])
    return Row(length, sample, depth, tokens, keys[asked], length - len(end) - prompt.key_digits)


def _place(prompt: Prompt, haystack: np.ndarray, depth: float) -> int:
    """Where `depth` percent of the text end, moved back to the last sentence end if one is near."""
    at = round(depth / 100 * len(haystack))
    if depth == 100:
        return at
    near = max(1, at - len(haystack) // 50)
    return next((i for i in range(at, near, -1) if haystack[i - 1] == prompt.full_stop), at)


def make_batch(prompt: Prompt, rows: Sequence[Row]) -> Batch:
    """Rows as a Batch without labels; with a mask token the answers are masked."""
    from neomoba_dist.generate.stage import batch_of

    texts = [row.tokens.copy() for row in rows]
    if prompt.mask is not None:
        for row, tokens in zip(rows, texts, strict=True):
            tokens[row.answer : row.answer + prompt.key_digits] = prompt.mask
    return batch_of([tokens.tolist() for tokens in texts], "cpu")


def score(model: Scorer, prompt: Prompt, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(right among ten digits, right in the vocabulary), each bool [R, K]."""
    ahead = 1 if prompt.mask is None else 0  # a causal model answers one place before
    start = np.cumsum([0, *(row.length for row in rows)])[:-1].tolist()
    first = [at + row.answer - ahead for at, row in zip(start, rows, strict=True)]
    places = [place + digit for place in first for digit in range(prompt.key_digits)]
    choice, top = model.choices(make_batch(prompt, rows), places, prompt.digits.tolist())
    key = np.stack([row.key for row in rows])
    return np.reshape(choice, key.shape) == key, np.reshape(top, key.shape) == prompt.digits[key]
