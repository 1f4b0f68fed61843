"""Span corruption (T5, arXiv 1910.10683, section 3.1.4) in whole numbers: how much of a text is dropped, and how long
the rows of the encoder and of the decoder then are, whatever they hold.

Of a text of n tokens, m are dropped in k spans. The encoder reads n - m + k tokens, a sentinel in the place of each
span; the decoder writes m + k + 1, each span after its sentinel, and one more sentinel at the end. Both grow with n by
the same amount every PERIOD tokens, so that the bounds below need look no further.
"""

from typing import Final, NamedTuple

NOISE_DENSITY: Final = (3, 20)  # 15 %
MEAN_SPAN: Final = 3
PERIOD: Final = NOISE_DENSITY[1]
_ENCODER_GROWTH: Final = PERIOD - NOISE_DENSITY[0] + NOISE_DENSITY[0] // MEAN_SPAN
_DECODER_GROWTH: Final = NOISE_DENSITY[0] + NOISE_DENSITY[0] // MEAN_SPAN
_BORDERS: Final = 2  # tokens of a document that are never dropped: its first and last one, where they are special
_STEP: Final = 16  # rows come in whole multiples of it, where sequence_length does


class CorruptedLengths(NamedTuple):
    """Tokens of a row of the encoder and of the decoder, and how many sentinels a document may need."""

    encoder: int
    decoder: int
    sentinels: int


def noise_counts(tokens: int) -> tuple[int, int]:
    """How many of so many tokens are dropped, and in how many spans: 15 %, rounded, in spans of 3 on average.

    A text of up to three tokens stays whole: (0, 0).
    """
    share, whole = NOISE_DENSITY
    dropped = (2 * share * tokens + whole) // (2 * whole)
    return dropped, max(1, (2 * dropped + MEAN_SPAN) // (2 * MEAN_SPAN)) if dropped else 0


def encoder_tokens(tokens: int) -> int:
    """Tokens that the encoder reads of so many."""
    dropped, spans = noise_counts(tokens)
    return tokens - dropped + spans


def decoder_tokens(tokens: int) -> int:
    """Tokens that the decoder writes of so many; none where nothing is dropped."""
    dropped, spans = noise_counts(tokens)
    return dropped + spans + 1 if dropped else 0


def corrupted_lengths(sequence_length: int, max_documents: int) -> CorruptedLengths:
    """What rows of `sequence_length` tokens in at most `max_documents` documents become at most, rounded up.

    Every row of the encoder has room for padding, so that the decoder's padding has something to attend to.
    """
    few = range(3 * PERIOD)
    more = [
        max(PERIOD * count(tokens) - growth * tokens for tokens in few)  # of a document beyond its share, in 1/PERIOD
        for count, growth in ((encoder_tokens, _ENCODER_GROWTH), (decoder_tokens, _DECODER_GROWTH))
    ]
    more[0] += _BORDERS * (PERIOD - _ENCODER_GROWTH)
    encoder = min((_ENCODER_GROWTH * sequence_length + more[0] * max_documents) // PERIOD, sequence_length) + 1
    decoder = (_DECODER_GROWTH * sequence_length + more[1] * max_documents) // PERIOD
    step = _STEP if sequence_length % _STEP == 0 else 1
    encoder, decoder = (-(-length // step) * step for length in (encoder, max(decoder, 1)))
    return CorruptedLengths(encoder, decoder, sentinels=noise_counts(sequence_length)[1] + 1)
