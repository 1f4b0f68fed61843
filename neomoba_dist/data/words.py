"""Words of a vocabulary, for whole-word masking: which ids go on with the word of the id before them."""

from __future__ import annotations

import numpy as np

from neomoba_dist.data.masking import WordTable
from neomoba_dist.data.tokenizer import Tokenizer

_SPACE_MARKS = ("▁", "Ġ")  # of SentencePiece and of byte-level BPE: the piece starts with a space


def word_table(tokenizer: Tokenizer) -> WordTable:
    """The table of a tokenizer's vocabulary.

    WordPiece marks what continues a word by "##". Elsewhere a word is a run of letters, digits and bytes of characters
    that are cut over several ids; a piece that starts with a space starts a word.
    """
    reserved = set(tokenizer.reserved_ids())
    continues = np.zeros(tokenizer.vocab_size, bool)
    is_open = np.zeros(tokenizer.vocab_size, bool)
    for i in range(tokenizer.vocab_size):
        if i in reserved:
            continue
        name = tokenizer.token(i)
        if tokenizer.kind == "wordpiece":
            continues[i], is_open[i] = name.startswith("##"), True
        else:
            text = tokenizer.decode([i])
            continues[i] = not name.startswith(_SPACE_MARKS) and _in_word(text[:1])
            is_open[i] = _in_word(text[-1:])
    return WordTable(continues, is_open)


def _in_word(character: str) -> bool:
    # a piece that is part of a character decodes to the replacement character
    return character.isalnum() or character == "\N{REPLACEMENT CHARACTER}"
