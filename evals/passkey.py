"""The passkey prompts of the needle task: written from real text, scored in one forward.

    [CLS] text ... The passkey is "48213". Remember the passkey. ... text What is the passkey? The passkey is "48213".

CLM: the digits of the answer are scored with the true digits before them (teacher forcing; all five first choices right
is the same as greedy decoding right). MLM: the five digits of the answer are [MASK]ed together.

Legend: R rows, L tokens in a row, K digits of the key, V vocabulary, H hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from evals.cli import EvalError

if TYPE_CHECKING:
    import torch

    from neomoba_dist.data.batch import Batch
    from neomoba_dist.data.corpus import Corpus
    from neomoba_dist.data.tokenizer import Tokenizer

NEEDLE = (' The passkey is "', '". Remember the passkey.')
QUESTION = (' What is the passkey? The passkey is "', '".')
KEY_DIGITS = 5


class Scorer(Protocol):
    """What the task needs of a model."""

    def hidden_states(self, batch: Batch) -> torch.Tensor: ...
    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Prompt:
    """The pieces of a prompt as ids. digits int64 [10]: the token of each digit within a key."""

    head: list[int]
    needle: tuple[list[int], list[int]]
    question: tuple[list[int], list[int]]
    full_stop: int
    digits: np.ndarray
    mask: int | None

    @property
    def overhead(self) -> int:
        """Tokens that are not haystack."""
        return len(self.head) + sum(map(len, (*self.needle, *self.question))) + 2 * KEY_DIGITS


@dataclass(frozen=True)
class Row:
    """One prompt with its answer. tokens int64 [L]; key int64 [K], digits 0..9; answer: place of the first digit."""

    length: int
    sample: int
    depth: float
    tokens: np.ndarray
    key: np.ndarray
    answer: int


def make_prompt(tokenizer: Tokenizer, *, mask: bool) -> Prompt:
    """The prompt's pieces in the tokenizer's ids. Raises EvalError if it has no token for every digit, or no mask."""
    special = tokenizer.special
    # the last id: SentencePiece may put its word-start sign before it as a token of its own
    digits = [(tokenizer.encode(str(digit)) or [-1])[-1] for digit in range(10)]
    if len(set(digits)) < 10 or -1 in digits:
        raise EvalError("needle: the tokenizer has no token for each of the digits 0 to 9; leave needle out of --tasks")
    if mask and special.mask is None:
        raise EvalError("needle: the tokenizer has no mask token; leave needle out of --tasks")
    before, after, ask, end = map(tokenizer.encode, (*NEEDLE, *QUESTION))
    return Prompt(
        head=[] if special.cls is None else [special.cls],
        needle=(before, after),
        question=(ask, end + ([] if special.sep is None else [special.sep])),
        full_stop=tokenizer.encode("end.")[-1],
        digits=np.array(digits),
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
    key = np.array([draw.randrange(10) for _ in range(KEY_DIGITS)])
    at = round(depth / 100 * len(haystack))
    near = max(1, at - len(haystack) // 50)
    if depth < 100:
        at = next((i for i in range(at, near, -1) if haystack[i - 1] == prompt.full_stop), at)
    spelt = prompt.digits[key]
    (before, after), (ask, end) = prompt.needle, prompt.question
    pieces = [prompt.head, haystack[:at], before, spelt, after, haystack[at:], ask, spelt, end]
    tokens = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
    return Row(length, sample, depth, tokens, key, length - len(end) - KEY_DIGITS)


def make_batch(prompt: Prompt, rows: Sequence[Row]) -> Batch:
    """Rows of one length as a Batch without labels; with a mask token the answers are masked."""
    import torch

    from neomoba_dist.data.batch import IGNORE_LABEL, Batch
    from neomoba_dist.parallel.documents import check_cu_seqlens

    length = rows[0].length
    tokens = np.stack([row.tokens for row in rows])
    if prompt.mask is not None:
        for i, row in enumerate(rows):
            tokens[i, row.answer : row.answer + KEY_DIGITS] = prompt.mask
    input_ids = torch.from_numpy(tokens.reshape(-1))
    cu_seqlens = torch.arange(0, len(input_ids) + 1, length, dtype=torch.int32)
    check_cu_seqlens(cu_seqlens, len(input_ids))
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_LABEL),
        position_ids=torch.arange(length).repeat(len(rows)),
        cu_seqlens=cu_seqlens,
        row_ids=torch.arange(len(rows)),
        num_valid=0,
    )


def score(
    model: Scorer, prompt: Prompt, rows: Sequence[Row], device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """(right among ten digits, right in the vocabulary), each bool [R, K]."""
    import torch

    batch = make_batch(prompt, rows).to(device)
    ahead = 1 if prompt.mask is None else 0  # a causal model answers one place before
    first = torch.tensor([i * row.length + row.answer - ahead for i, row in enumerate(rows)], device=device)
    places = (first[:, None] + torch.arange(KEY_DIGITS, device=device)).reshape(-1)
    with torch.inference_mode():
        logits = model.logits(model.hidden_states(batch)[places]).float().cpu()  # [R * K, V]
    key = np.stack([row.key for row in rows])
    digits = torch.from_numpy(prompt.digits)
    choice = logits[:, digits].argmax(-1).numpy().reshape(key.shape)
    top = logits.argmax(-1).numpy().reshape(key.shape)
    return choice == key, top == prompt.digits[key]
