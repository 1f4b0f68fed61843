"""Text that the tokenizer does not know: counted, named where it is much, refused where it is most of the text.

A vocabulary without a script, or a WordPiece model before a word of more than 100 characters, gives one [UNK] for a
word, a line or a megabyte. So two shares are counted: of the tokens, and of the characters that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import MUCH_UNKNOWN
from neomoba_dist.data.tokenizer import Tokenizer

_REFUSED = 0.5
_EXAMPLE_CHARACTERS = 40


def visible_characters(text: str) -> int:
    """Characters other than white space, which some tokenizers drop and others count as unknown."""
    return len("".join(text.split()))


@dataclass
class UnknownText:
    """Counts over text: `tokens` without document borders, `unknown_tokens` among them; `characters` without white
    space, `unknown_characters` among them; the first unknown text."""

    tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0
    unknown_characters: int = 0
    example: str = ""

    @classmethod
    def of(cls, texts: list[str], ids: list[np.ndarray], tokenizer: Tokenizer) -> UnknownText:
        """The counts of texts and their ids, integers [n] each."""
        unk = tokenizer.special.unk
        unknown: list[str] = []
        for text, found in zip(texts, ids, strict=True):
            if unk is not None and (found == unk).any():  # offsets cost as much as the ids: only where needed
                unknown += [text[start:stop] for start, stop in tokenizer.unknown_spans(text)]
        return cls(
            tokens=sum(map(len, ids)),
            unknown_tokens=len(unknown),
            characters=sum(map(visible_characters, texts)),
            unknown_characters=sum(map(visible_characters, unknown)),
            example=unknown[0][:_EXAMPLE_CHARACTERS] if unknown else "",
        )

    def add_part(self, path: Path) -> None:
        """Adds the counts of a part's file (`blocks.tokenize_block`)."""
        with np.load(path, allow_pickle=False) as part:
            for name in ("tokens", "unknown_tokens", "characters", "unknown_characters"):
                setattr(self, name, getattr(self, name) + int(part[name]))
            self.example = self.example or str(part["example"])

    @property
    def token_share(self) -> float:
        """Unknown among the tokens, 0 to 1."""
        return self.unknown_tokens / max(1, self.tokens)

    @property
    def text_share(self) -> float:
        """Unknown among the characters, 0 to 1."""
        return self.unknown_characters / max(1, self.characters)

    def report(self, allow: bool, advice: str) -> None:
        """Prints a warning above 1 %; DataError above 50 %, unless `allow`. `advice`: what to do about it."""
        share = max(self.token_share, self.text_share)
        if share <= MUCH_UNKNOWN:
            return
        example = f", such as {self.example!r}" if self.example else ""
        said = (
            f"{self.unknown_tokens} of {self.tokens} tokens are unknown to the tokenizer ({self.token_share:.2%} of "
            f"the tokens{f', {self.text_share:.2%} of the text' if self.characters else ''}){example}"
        )
        if share > _REFUSED and not allow:
            raise DataError(f"--tokenizer: {said}; {advice}, or add --allow-unknown")
        print(f"warning: {said}; {advice}")
