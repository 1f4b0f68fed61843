"""Span corruption (T5, arXiv 1910.10683, section 3.1.4): the encoder reads a text without some spans, the decoder
writes them.

"a b c d e f" without "b" and "e f" is "a <0> c d <1>" for the encoder, and "<0> b <1> e f <2>" for the decoder. Spans
are a pure function of (seed, row id): see counter.py. How many tokens, spans and sentinels: config/span_corruption.py.

T5's own code begins every text with kept tokens and ends it with dropped ones; here all positions are dropped equally
often, but for a few at either end.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from neomoba_dist.config.span_corruption import noise_counts
from neomoba_dist.data.counter import SPANS, Counter
from neomoba_dist.data.errors import AgreedError, DataError
from neomoba_dist.data.rows import RowBlock
from neomoba_dist.data.tokenizer import Tokenizer

# T5's names first; then entries that vocabularies keep free for such uses: BERT's, SentencePiece's, Llama 3's
SENTINEL_NAMES = ("<extra_id_{}>", "[unused{}]", "<unused{}>", "<|reserved_special_token_{}|>")


class Corrupted(NamedTuple):
    """What becomes of one document: what the encoder reads and what the decoder writes, each an array of ids."""

    source: np.ndarray
    target: np.ndarray


class SpanCorruption:
    """Draws spans.

    sentinels: ids of the tokens that stand for the first, second, ... span of a document, int64. ordinary: bool
    [vocab_size], False for special ids; a document's first and last token are never dropped where they are special.
    """

    def __init__(self, seed: int, sentinels: np.ndarray, ordinary: np.ndarray) -> None:
        self._counter, self._sentinels, self._ordinary = Counter(seed, SPANS), sentinels, ordinary

    def corrupt(self, block: RowBlock) -> list[list[Corrupted]]:
        """The documents of every row, in order."""
        found: list[list[Corrupted]] = [[] for _ in block.row_ids]
        words = [self._counter.words(row_id, block.length) for row_id in block.row_ids.tolist()]
        for start, length in zip(block.piece_start.tolist(), block.piece_length.tolist(), strict=True):
            row, place = divmod(start, block.length)
            tokens = block.tokens_T[start : start + length].astype(np.int64)
            found[row].append(self._corrupt(tokens, words[row][place : place + length]))
        return found

    def _corrupt(self, tokens: np.ndarray, words: np.ndarray) -> Corrupted:
        """words: random uint64, one for each token."""
        first, last = int(not self._ordinary[tokens[0]]), len(tokens) - int(not self._ordinary[tokens[-1]])
        body = tokens[first : max(first, last)]
        starts, lengths = choose_spans(len(body), words)
        if not len(starts):
            return Corrupted(tokens, tokens[:0])
        edges = np.zeros(len(body) + 1, np.int64)
        edges[starts], edges[starts + lengths] = 1, -1
        dropped = edges[:-1].cumsum().astype(bool)
        source = body.copy()
        source[starts] = self._sentinels[: len(starts)]
        kept = ~dropped
        kept[starts] = True
        source = np.concatenate((tokens[:first], source[kept], tokens[first + len(body) :]))
        before = np.append(0, lengths.cumsum())  # places of the sentinels among the dropped tokens
        return Corrupted(source, np.insert(body[dropped], before, self._sentinels[: len(before)]))


def choose_spans(tokens: int, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of the spans to drop of so many tokens, ascending, int64 [spans] each; no two touch.

    Every way to cut the dropped tokens into spans, and to put these into the gaps between kept tokens, at most one into
    each, is as likely as any other. words: random uint64, at least `tokens` of them.
    """
    dropped, spans = noise_counts(tokens)
    if not spans:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    gaps = tokens - dropped + 1
    gap = _choose(words[:gaps], spans)
    cuts = _choose(words[gaps:tokens], spans - 1) + 1
    lengths = np.diff(np.concatenate(([0], cuts, [dropped])))
    return gap + lengths.cumsum() - lengths, lengths


def _choose(words: np.ndarray, count: int) -> np.ndarray:
    """`count` different places of random words, ascending."""
    return np.sort(np.argsort(words, kind="stable")[:count])


def encode_source(tokenizer: Tokenizer, text: str, needed: int) -> tuple[list[int], int | None]:
    """Ids of a text that is to be filled in, as a document with dropped spans, and the id of the sentinel after those
    that stand in it, with which what is written ends; None where the tokenizer has no more.

    needed: sentinels of the training rows, which tell how they are named. A space before a sentinel belongs to the
    span, because tokens begin with their space. DataError for a text without sentinels or with one twice.
    """
    name = next((name for name in SENTINEL_NAMES if len(_sentinels(tokenizer, name, needed)) == needed), None)
    if name is None:
        raise DataError(
            f"the tokenizer has no {needed} sentinels ({SENTINEL_NAMES[0].format(0)}, ...); give the model's"
        )
    before, after = map(re.escape, name.split("{}"))
    first, *rest = re.split(rf" ?{before}(\d+){after}", text)
    ids, numbers = tokenizer.encode(first), rest[::2]
    start = text if len(text) <= 40 else text[:40] + "..."
    if not numbers:
        raise DataError(f"prompt {start!r}: write {name.format(0)}, {name.format(1)}, ... where text is missing")
    if len(set(numbers)) < len(numbers):
        raise DataError(
            f"prompt {start!r}: a sentinel stands twice; number them {name.format(0)}, {name.format(1)}, ..."
        )
    for number, piece in zip(numbers, rest[1::2], strict=True):
        sentinel = tokenizer.id_of(name.format(number))
        if sentinel is None:
            raise DataError(f"{name.format(number)}: the tokenizer has no such sentinel; use lower numbers")
        ids += [sentinel, *tokenizer.encode(piece)]
    return tokenizer.wrap_document(ids), tokenizer.id_of(name.format(1 + max(map(int, numbers))))


def _sentinels(tokenizer: Tokenizer, name: str, most: int) -> list[int]:
    """Ids of the first ones of a name, up to `most`."""
    ids: list[int] = []
    while len(ids) < most and (token_id := tokenizer.id_of(name.format(len(ids)))) is not None:
        ids.append(token_id)
    return ids


def find_sentinels(tokenizer: Tokenizer, needed: int, length: int, corpus: str) -> np.ndarray:
    """Ids of the first `needed` sentinels of a tokenizer, int64. AgreedError, in one line, where it has fewer.

    length: of the rows that need so many. corpus: its name.
    """
    most: list[int] = []
    for name in SENTINEL_NAMES:
        ids = _sentinels(tokenizer, name, needed)
        if len(ids) == needed:
            return np.array(ids, np.int64)
        most = max(most, ids, key=len)
    raise AgreedError(
        f"{corpus}: its tokenizer has {len(most)} sentinel tokens ({SENTINEL_NAMES[0].format(0)}, ...), and rows of "
        f"{length} tokens need {needed} for span corruption; make one with: python -m data_tools.train_tokenizer "
        f"--sentinels {needed}, and tokenize with it, or lower neomoba.phase.sequence_length"
    )
