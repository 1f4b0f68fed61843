"""Labels: masked-language-model masks and next-token labels of one packed row.

A mask is a pure function of (seed, row id): it is drawn from the counter-based Philox generator (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3") keyed by the two, so it does not depend on the rank, on the order of
reading or on a resume. Only raw Philox words are used, whose values numpy keeps fixed for ever. L = tokens in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neomoba_dist.data.batch import IGNORE_LABEL
from neomoba_dist.data.errors import DataError

SCHEMES = {"80/10/10": (0.8, 0.9), "all": (1.0, 1.0)}


@dataclass(frozen=True)
class MaskedLanguageModel:
    """Draws MLM masks (Devlin et al. 2019, section 3.1).

    Each ordinary token is chosen with `probability`; of the chosen, scheme "80/10/10" turns 80 % into `mask_id`, 10 %
    into a random ordinary token and leaves 10 %; "all" turns all into `mask_id`. Tokens whose id is not `ordinary`
    (bool [vocab_size]: False for special and unused ids, padding included) are never chosen and never drawn.
    """

    seed: int
    probability: float
    scheme: str
    mask_id: int
    ordinary: np.ndarray

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise DataError(f"mlm_scheme {self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        if not 0.0 < self.probability < 1.0:
            raise DataError(f"mlm_probability {self.probability}: give a share between 0 and 1, for example 0.2")

    @cached_property
    def _choices(self) -> np.ndarray:
        return np.flatnonzero(self.ordinary)

    def apply(self, tokens_L: np.ndarray, row_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks one row. `tokens_L` int64 [L]; returns (input_ids, labels), int64 [L], labels -100 where not chosen."""
        length = len(tokens_L)
        # one word a token: the upper half chooses, the lower half decides what becomes of the chosen
        words = np.random.Philox(key=np.array([self.seed, row_id], np.uint64)).random_raw(length)
        chosen = (words >> np.uint64(32)) < np.uint64(round(self.probability * 2**32))
        chosen &= self.ordinary[tokens_L]
        where = np.flatnonzero(chosen)

        action = (words[where] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        to_mask, to_random = (round(share * 2**32) for share in SCHEMES[self.scheme])
        input_ids = tokens_L.copy()
        input_ids[where[action < to_mask]] = self.mask_id
        randomised = (action >= to_mask) & (action < to_random)
        if to_random > to_mask:
            # where it lies between the two limits is uniform again: 4e8 values, spread over the ordinary ids
            draw = (action[randomised] - to_mask) * len(self._choices) // (to_random - to_mask)
            input_ids[where[randomised]] = self._choices[draw]

        labels = np.full(length, IGNORE_LABEL, dtype=np.int64)
        labels[where] = tokens_L[where]
        return input_ids, labels


def next_token_labels(tokens_L: np.ndarray, piece_lengths: np.ndarray) -> np.ndarray:
    """Causal labels: int64 [L], the next token of the same document; -100 at each document's end and on padding.

    `piece_lengths` int64 [pieces]: lengths of the row's documents; their sum is the row's used part.
    """
    labels = np.full(len(tokens_L), IGNORE_LABEL, dtype=np.int64)
    ends = np.cumsum(piece_lengths)
    used = int(ends[-1])
    labels[: used - 1] = tokens_L[1:used]
    labels[ends - 1] = IGNORE_LABEL
    return labels
