"""One small interface over the tokenizer libraries: `tokenizers` (WordPiece, byte-level BPE) and `sentencepiece`.

Existing tokenizers load without network: a folder or file of ours (`tokenizer.json`, `tokenizer.model`), BERT's
`vocab.txt`, GPT-2's `encoder.json` + `vocab.bpe`. Special tokens written inside a text are plain text: only
`wrap_document`, the masks and the padding place special ids. The libraries are imported when a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Names by which a role is known in the field, the first found wins. A role stands in the vocabulary itself,
# so a tokenizer needs no second file beside it.
_ROLE_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("[BOS]", "<s>", "[CLS]", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "[SEP]", "<|endoftext|>"),
}
_OVER_LINE_END = re.compile(r"[^\n]\n")
# parts of a tokenizer.json that look at no character across a line end
_SPLIT_AT_WHITE_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_CHARACTER_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}
_UNUSED_NAME = re.compile(r"\[unused\d+\]|<unused\d+>")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Token id of each role, None where the tokenizer has no such token."""

    pad: int | None = None
    unk: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None

    @property
    def padding(self) -> int:
        """The id that fills a row's end: [PAD], else the end-of-text token as decoders do, else 0."""
        return next((i for i in (self.pad, self.eos) if i is not None), 0)


class Tokenizer(ABC):
    """A trained tokenizer. Every id is below `vocab_size`; `payload` is its one file, saved as `file_name`."""

    file_name: str
    kind: str
    payload: bytes
    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without document borders. Uses one core."""

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same ids as integer arrays [n], in the way that costs the library least."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; may use all cores."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens written by their names."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """The vocabulary's entry of one id."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is none."""

    @abstractmethod
    def reserved_ids(self) -> list[int]:
        """Sorted ids that no text yields: special and unused entries. Never masked, never drawn at random."""

    @cached_property
    def special(self) -> SpecialIds:
        """The id of each role."""
        found = {
            role: next((i for i in map(self.id_of, names) if i is not None), None)
            for role, names in _ROLE_NAMES.items()
        }
        return SpecialIds(**found)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the tokenizer's file."""
        return hashlib.sha256(self.payload).hexdigest()

    @cached_property
    def document_borders(self) -> tuple[list[int], list[int]]:
        """Ids before and after a document: [CLS] and [SEP]; where there is neither, the end-of-text token after it."""
        end = self.special.sep if self.special.sep is not None else self.special.eos
        return [] if self.special.cls is None else [self.special.cls], [] if end is None else [end]

    def wrap_document(self, ids: list[int]) -> list[int]:
        """`ids` between the borders of a document."""
        head, tail = self.document_borders
        return head + ids + tail

    @abstractmethod
    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """[start, stop) in `text` of what each unknown token of its ids stands for. Slower than `encode`."""

    @property
    @abstractmethod
    def splits_at_line_ends(self) -> bool:
        """True if a text, cut before any line end that follows a visible character, yields the ids of the whole."""

    def save(self, folder: Path) -> Path:
        """Writes the tokenizer's file into `folder` (made if missing) and returns its path."""
        from neomoba_dist.data.index import write_atomically

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / self.file_name, self.payload)
        return folder / self.file_name


class HuggingFaceTokenizer(Tokenizer):
    """WordPiece and byte-level BPE of the `tokenizers` library, held as a `tokenizer.json`."""

    file_name = TOKENIZER_JSON

    def __init__(self, payload: bytes) -> None:
        import tokenizers

        self.payload = payload
        self._backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(payload.decode("utf-8"))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.kind = type(self._backend.model).__name__.lower()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        # the "fast" call tracks no character offsets: twice the rate of encode()
        return self.encode_batch([text])[0]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        # one call: each moves to a thread of the library, whose caches are cold (a fifth slower for GPT-2)
        return [np.fromiter(ids, np.int32, len(ids)) for ids in self.encode_batch(texts)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        found = self._backend.encode(text, add_special_tokens=False)
        return [span for i, span in zip(found.ids, found.offsets, strict=True) if i == self.special.unk]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or f"<{token_id}>"

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def reserved_ids(self) -> list[int]:
        names = self._backend.get_vocab().items()
        unused = {i for name, i in names if "unused" in name and _UNUSED_NAME.fullmatch(name)}
        special = {i for i, added in self._backend.get_added_tokens_decoder().items() if added.special}
        roles = {i for i in vars(self.special).values() if i is not None}
        return sorted(unused | special | roles)

    @property
    def splits_at_line_ends(self) -> bool:
        state = json.loads(self.payload)
        normalizer = state["normalizer"] or {"type": "Sequence", "normalizers": []}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        words = state["pre_tokenizer"] or {"type": "none"}
        # GPT-2's expression begins a new match at white space that follows anything else
        byte_level = words["type"] == "ByteLevel" and not words["add_prefix_space"] and words.get("use_regex", True)
        return (
            (byte_level or words["type"] in _SPLIT_AT_WHITE_SPACE)
            and all(step["type"] in _CHARACTER_NORMALIZERS for step in steps)
            and all(token["special"] for token in state["added_tokens"])
            and not state["model"].get("dropout")
        )


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece unigram and BPE models, held as a `tokenizer.model`."""

    file_name = TOKENIZER_MODEL

    def __init__(self, payload: bytes) -> None:
        import sentencepiece

        self.payload = payload
        self.kind = "sentencepiece"
        self._backend: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor(model_proto=payload)
        self.vocab_size: int = self._backend.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, out_type=int)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._backend.encode(text, return_type="numpy") for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), out_type=int)

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        found = self._backend.encode(text, return_type="offset_mapping")
        return [span for i, span in zip(found["ids"], found["offsets"], strict=True) if i == self.special.unk]

    def decode(self, ids: Iterable[int]) -> str:
        # the library drops control pieces, so the text is decoded run by run and their names put between
        parts: list[str] = []
        run: list[int] = []
        for token_id in map(int, ids):
            if self._backend.is_control(token_id):
                parts += [self._backend.decode(run), self.token(token_id)]
                run = []
            else:
                run.append(token_id)
        return "".join([*parts, self._backend.decode(run)])

    def token(self, token_id: int) -> str:
        return self._backend.id_to_piece(token_id)

    def id_of(self, token: str) -> int | None:
        found = self._backend.piece_to_id(token)
        return found if self._backend.id_to_piece(found) == token else None

    def reserved_ids(self) -> list[int]:
        backend = self._backend
        return [
            i for i in range(self.vocab_size) if backend.is_control(i) or backend.is_unknown(i) or backend.is_unused(i)
        ]

    @property
    def splits_at_line_ends(self) -> bool:
        # Merges (BPE, whose scores are ranks) happen inside pieces: none may reach over a line end, and normalisation
        # has to leave line ends and spaces alone. Unigram sums probabilities over the whole text in single precision:
        # in a book their rounding decides between equal readings.
        backend = self._backend
        kept = "x\n\n  x "
        return backend.normalize(kept).replace("\u2581", " ") == kept and all(
            backend.get_score(i).is_integer() and not _OVER_LINE_END.search(backend.id_to_piece(i))
            for i in range(self.vocab_size)
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer without network.

    `path`: a folder (of `train_tokenizer`, of a corpus, or with one of the files below) or one of `tokenizer.json`,
    `*.model`, `*vocab.txt` (BERT; lower-cases unless the vocabulary itself has capitals), `*encoder.json` (GPT-2,
    with `*vocab.bpe` beside it). Raises DataError with one line.
    """
    from neomoba_dist.data.tokenizer_formats import bert_json, gpt2_json

    path = Path(path)
    file = _tokenizer_file(path) if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no such tokenizer; make one with: python -m data_tools.train_tokenizer --help")
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file.read_bytes())
        if file.suffix == ".txt":
            return HuggingFaceTokenizer(bert_json(file, SPECIAL_TOKENS))
        if file.name.endswith("encoder.json"):
            return HuggingFaceTokenizer(gpt2_json(file))
        return HuggingFaceTokenizer(file.read_bytes())
    except DataError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError on damaged files
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: not a usable tokenizer file ({reason})") from error


def _tokenizer_file(folder: Path) -> Path:
    """The one tokenizer file in `folder`."""
    for pattern in (TOKENIZER_JSON, TOKENIZER_MODEL, "*vocab.txt", "*encoder.json", "*.model"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataError(f"{folder}: several tokenizers ({', '.join(f.name for f in found)}); name one file")
        if found:
            return found[0]
    raise DataError(f"{folder}: holds no tokenizer; make one with: python -m data_tools.train_tokenizer --help")
