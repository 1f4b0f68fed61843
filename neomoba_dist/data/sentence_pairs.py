"""Pairs of texts for next-sentence prediction (BERT, arXiv 1810.04805, sections 3.1 and A.2), made of packed rows.

A document [CLS] t1 ... tn [SEP] becomes the pair [CLS] A [SEP] B [SEP]: the token at the cut becomes the separator. As
in the paper, A and B are stretches of text, not sentences. The documents of a row that are long enough are put in
groups of two or three, alike in length; in a group all Bs have one length, and in half of the groups they change
places. So every document keeps its length and place, and neither says whether B goes on with A. All of it is a pure
function of (seed, row id), as masks are (masking.py). T = rows * length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from neomoba_dist.data.batch import IGNORE_LABEL
from neomoba_dist.data.counter import PAIRS, Counter
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.rows import RowBlock
from neomoba_dist.data.tokenizer import SpecialIds

IS_NEXT, NOT_NEXT = 0, 1  # labels
LEAST_TOKENS = 8  # of A, and of B with the document's last token
LEAST_DOCUMENT = 2 * LEAST_TOKENS + 2  # with [CLS] and the separator


class SentencePairs:
    """Makes pairs of the documents of rows. DataError where the tokenizer has no [CLS] or no [SEP]."""

    def __init__(self, seed: int, special: SpecialIds, name: str) -> None:
        """name: of the corpus, for messages."""
        if special.cls is None or special.sep is None:
            raise DataError(
                f"{name}: its tokenizer has no [CLS] and [SEP], between which neomoba.model.next_sentence_prediction "
                "puts its pairs; set it to false or tokenize with another tokenizer"
            )
        self._cls, self._sep = special.cls, special.sep
        self._counter = Counter(seed, PAIRS)

    def apply(self, block: RowBlock, token_types_T: np.ndarray, labels_T: np.ndarray) -> RowBlock:
        """The rows with their documents turned into pairs.

        Fills `token_types_T`, int64 [T], all 0, with 1 where B lies, and `labels_T`, int64 [T], all -100, at the first
        token of every pair. A document that is too short, does not begin with [CLS], or is alone in its row stays.
        """
        tokens_T = block.tokens_T.copy()
        for documents, cut, moved in self._groups(block):
            stops = block.piece_start[documents] + block.piece_length[documents]
            second = (stops - cut)[:, None] + np.arange(cut)
            tokens_T[second] = block.tokens_T[np.roll(second, -1, axis=0) if moved else second]
            tokens_T[second[:, 0] - 1] = self._sep
            token_types_T[second] = 1
            labels_T[block.piece_start[documents]] = NOT_NEXT if moved else IS_NEXT
        return replace(block, tokens_T=tokens_T)

    def _groups(self, block: RowBlock) -> Iterator[tuple[np.ndarray, int, bool]]:
        """Pieces of a row, int64 [2 or 3]; how many of their last tokens are B; whether Bs change places."""
        begins = block.tokens_T[block.piece_start] == self._cls
        eligible = np.flatnonzero(begins & (block.piece_length >= LEAST_DOCUMENT))
        row_of = block.piece_start[eligible] // block.length
        borders = np.searchsorted(row_of, np.arange(len(block.row_ids) + 1))
        for row_id, first, last in zip(block.row_ids.tolist(), borders[:-1], borders[1:], strict=True):
            documents = eligible[first:last]
            if len(documents) < 2:
                continue
            words = self._counter.words(row_id, 2 * len(documents))
            chance, draws = words[: len(documents)], words[len(documents) :]
            # shorter ones bound the Bs of a group: lengths within a factor of two together, else by chance
            order = np.lexsort((chance, np.frexp(block.piece_length[documents])[1]))
            for group, draw in zip(np.array_split(documents[order], len(documents) // 2), draws.tolist(), strict=False):
                choices = int(block.piece_length[group].min()) - LEAST_DOCUMENT + 1
                yield group, LEAST_TOKENS + (draw >> 1) % choices, bool(draw & 1)


def count_pairs(labels_T: np.ndarray) -> int:
    """How many pairs have a label."""
    return int(np.count_nonzero(labels_T != IGNORE_LABEL))
