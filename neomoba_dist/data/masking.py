"""What the model is to predict: masked-language-model masks, next-token labels, and token dropout.

Masks are a pure function of (seed, row id): see counter.py. They are drawn late, when a batch is built, so rows wait
as they are stored. T = rows * length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neomoba_dist.data.batch import IGNORE_LABEL
from neomoba_dist.data.counter import ACTIONS, CHOICES, DROPOUT, Counter
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import RowBlock

SCHEMES = {"80/10/10": (0.8, 0.9), "all": (1.0, 1.0)}


@dataclass(frozen=True)
class WordTable:
    """Which ids belong to one word: an id goes on with the word of the id before it where it `continues` a word and
    the one before is `open`. Both bool [vocab_size]."""

    continues: np.ndarray
    open: np.ndarray

    def starts(self, block: RowBlock) -> np.ndarray:
        """bool [T]: True where a word starts. Words end with their piece of a document."""
        tokens_T = block.tokens_T
        starts_T = ~self.continues[tokens_T]
        starts_T[1:] |= ~self.open[tokens_T[:-1]]
        starts_T[block.piece_start] = True
        return starts_T


class MaskedLanguageModel:
    """Draws MLM masks (Devlin et al. 2019, section 3.1).

    Each ordinary token is chosen with `probability`, to 1 / 65,536; with `words`, all tokens of a word are chosen
    together ("whole-word masking"). Of the chosen, scheme "80/10/10" turns 80 % into `mask_id`, 10 % into a random
    ordinary token and leaves 10 %; "all" turns all into `mask_id`. Tokens whose id is not `ordinary` (bool
    [vocab_size]: False for special and unused ids) and padding are never chosen and never drawn.
    """

    def __init__(
        self,
        seed: int,
        probability: float,
        scheme: str,
        mask_id: int,
        ordinary: np.ndarray,
        words: WordTable | None = None,
    ) -> None:
        if scheme not in SCHEMES:
            raise DataError(f"mlm_scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
        if not 0.0 < probability < 1.0:
            raise DataError(f"mlm_probability {probability}: give a share between 0 and 1, for example 0.2")
        self.mask_id, self.words = mask_id, words
        self._share = _share16(probability)
        self._ordinary, self._ids = ordinary, np.flatnonzero(ordinary)
        self._limits = [round(share * 2**32) for share in SCHEMES[scheme]]
        self._choices, self._actions = Counter(seed, CHOICES), Counter(seed, ACTIONS)

    def apply(self, block: RowBlock, input_ids_T: np.ndarray, labels_T: np.ndarray) -> int:
        """Masks `input_ids_T` (int64 [T], holding the tokens) and fills `labels_T` (int64 [T], all -100) where chosen.

        Returns how many were chosen.
        """
        chosen_T = _below(self._choices, block, self._share)
        if self.words:
            starts = np.flatnonzero(self.words.starts(block))
            chosen_T = np.repeat(chosen_T[starts], np.diff(starts, append=len(chosen_T)))
        where = _of_text(block, np.flatnonzero(chosen_T), self._ordinary)
        labels_T[where] = block.tokens_T[where]
        to_mask, to_random = self._limits
        if to_mask == 2**32:
            input_ids_T[where] = self.mask_id
            return len(where)

        rows = np.arange(len(block.row_ids) + 1) * (len(input_ids_T) // len(block.row_ids))
        counts = np.diff(np.searchsorted(where, rows))
        per_row = zip(block.row_ids.tolist(), counts.tolist(), strict=True)
        action = np.concatenate([self._actions.bits(row_id, count, np.uint32) for row_id, count in per_row])
        input_ids_T[where[action < to_mask]] = self.mask_id
        randomised = np.flatnonzero((action >= to_mask) & (action < to_random))
        # where it lies between the two limits is uniform again: 4e8 values, spread over the ordinary ids
        draw = (action[randomised].astype(np.int64) - to_mask) * len(self._ids) // (to_random - to_mask)
        input_ids_T[where[randomised]] = self._ids[draw]
        return len(where)


class TokenDropout:
    """Hides a share of the ordinary tokens from the model and asks for nothing in return ("word dropout", Bowman et
    al. 2016, section 3.1): the input becomes `hidden_id`, the labels stay."""

    def __init__(self, seed: int, probability: float, hidden_id: int, ordinary: np.ndarray) -> None:
        self._counter, self._share = Counter(seed, DROPOUT), _share16(probability)
        self._hidden_id, self._ordinary = hidden_id, ordinary

    def apply(self, block: RowBlock, input_ids_T: np.ndarray, keep_T: np.ndarray) -> None:
        """Hides tokens in `input_ids_T`, int64 [T], but for those where `keep_T`, bool [T]."""
        dropped_T = _below(self._counter, block, self._share) & ~keep_T
        input_ids_T[_of_text(block, np.flatnonzero(dropped_T), self._ordinary)] = self._hidden_id


def next_token_labels(block: RowBlock, labels_T: np.ndarray) -> int:
    """Fills `labels_T`, int64 [T]: the next token of the same piece; -100 at each piece's end, on padding, and where
    the loss does not count that token (`RowBlock.counted_T`).

    Returns how many count.
    """
    labels_T[:-1] = block.tokens_T[1:]
    ends = block.piece_start + block.piece_length
    labels_T[ends - 1] = IGNORE_LABEL
    for start, stop in padding_runs(block):
        labels_T[start:stop] = IGNORE_LABEL
    if block.counted_T is not None:
        labels_T[:-1][~block.counted_T[1:]] = IGNORE_LABEL
        return int(np.count_nonzero(labels_T != IGNORE_LABEL))
    return int(block.piece_length.sum()) - len(ends)


def padding_runs(block: RowBlock) -> list[tuple[int, int]]:
    """[start, stop) of the runs of padding on the T axis."""
    stops = np.append(block.piece_start, len(block.tokens_T))
    starts = np.append(0, block.piece_start + block.piece_length)
    gaps = np.flatnonzero(stops > starts)
    return list(zip(starts[gaps].tolist(), stops[gaps].tolist(), strict=True))


def _share16(probability: float) -> np.uint16:
    return np.uint16(min(max(1, round(probability * 2**16)), 2**16 - 1))


def _below(counter: Counter, block: RowBlock, share: np.uint16) -> np.ndarray:
    """bool [T]: each True with probability share / 65,536."""
    below = np.empty((len(block.row_ids), len(block.tokens_T) // len(block.row_ids)), np.bool_)
    for row_id, out in zip(block.row_ids.tolist(), below, strict=True):
        np.less(counter.bits(row_id, len(out), np.uint16), share, out=out)
    return below.reshape(-1)


def _of_text(block: RowBlock, where: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """Those of the positions `where`, ascending, that hold an ordinary token."""
    where = where[ordinary[block.tokens_T[where]]]
    if ordinary[block.padding_id]:  # a tokenizer without special tokens pads with an ordinary id
        piece = np.searchsorted(block.piece_start, where, side="right") - 1
        where = where[(piece >= 0) & (where < (block.piece_start + block.piece_length)[piece])]
    return where
