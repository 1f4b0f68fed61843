"""Vocabulary files of BERT and GPT-2 as the `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from neomoba_dist.data.errors import DataError


def bert_json(vocab_file: Path, required: Sequence[str]) -> bytes:
    """BERT's vocab.txt as a tokenizer.json. required: tokens that it must hold."""
    names = vocab_file.read_text(encoding="utf-8").split("\n")
    vocab = {name.rstrip("\r"): i for i, name in enumerate(names) if name}
    missing = [name for name in required if name not in vocab]
    if missing:
        raise DataError(f"{vocab_file}: not a BERT vocabulary, {', '.join(missing)} missing")
    # vocab.txt does not say whether it is cased; a vocabulary with capitals can only be met by cased text
    cased = any(name != name.lower() for name in vocab if not name.startswith("["))
    bert = tokenizers.BertWordPieceTokenizer(vocab, lowercase=not cased)
    # the library's clean-up on decoding rewrites words ("do not" to "don't")
    bert.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return bert.to_str().encode("utf-8")


def gpt2_json(encoder_file: Path) -> bytes:
    """GPT-2's encoder.json and vocab.bpe as a tokenizer.json."""
    merges = encoder_file.with_name(encoder_file.name.removesuffix("encoder.json") + "vocab.bpe")
    if not merges.is_file():
        raise DataError(f"{encoder_file}: {merges.name} is missing beside it")
    backend = tokenizers.ByteLevelBPETokenizer(str(encoder_file), str(merges))
    backend.add_special_tokens(["<|endoftext|>"])
    return backend.to_str().encode("utf-8")
