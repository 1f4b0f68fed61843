"""Generated ids as text: prompt and continuation decoded together, because a token's text depends on its neighbours.

Alone, a WordPiece continuation loses the space before its first word and keeps the mark of a piece that goes on a word
("##key"), and SentencePiece drops the space that its first piece begins with.
"""

from collections.abc import Sequence

from neomoba_dist.data.tokenizer import Tokenizer


def continued_text(tokenizer: Tokenizer, prompt: str, continuation: Sequence[int]) -> str:
    """`prompt`, as it was given, and the text that the ids `continuation` add to it.

    Tokenizers that lower-case or lose white space would change the prompt; only what follows it is taken from the ids.
    """
    ids = tokenizer.encode(prompt)
    shown, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *continuation])
    if not whole.startswith(shown):  # a decoder that rewrites what it has written
        return whole
    added = whole[len(shown) :]
    if prompt[-1:].isspace() and not shown[-1:].isspace():  # the tokenizer has lost it, and separates words by its own
        added = added.removeprefix(" ")
    return prompt + added
