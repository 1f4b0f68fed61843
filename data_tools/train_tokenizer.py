"""Trains a tokenizer on text.

  wordpiece  BERT's: lower-cased, white space lost; the choice for MLM on prose
  unigram    SentencePiece unigram: newlines and runs of spaces kept, unknown characters as bytes; of all characters
             one is lost, U+2581, SentencePiece's own sign for a space: it comes back as one
  bpe        SentencePiece BPE, kept likewise
  byte_bpe   byte-level BPE (GPT-2's kind), exact on every text

All have [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4, and from 5 on <extra_id_0>, <extra_id_1>, ... as --sentinels
says, which span corruption needs (docs/parts.md). Writes OUTPUT/tokenizer.json or OUTPUT/tokenizer.model and, last,
OUTPUT/manifest.json with its sha256. The same text and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.cleaning import CleaningReport, clean_documents
from data_tools.cli import add_strict, check_output, command_parser, positive_float, positive_int, progress, run
from data_tools.sources import input_files, read_documents, total_bytes
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import tokenizers

_ALPHABET = 1000  # characters of a WordPiece vocabulary, the library's default
# SentencePiece learns from "sentences": pieces of about this many characters, cut at line ends so that newlines and
# indentation are learnt too.
_SENTENCE_CHARACTERS = 1000
# SentencePiece would learn pieces such as ".\\n"; with line ends as pieces of their own, long texts can be cut at them
_LINE_ENDS = ["\n" * n for n in range(1, 9)]


def train_wordpiece(texts: list[str], vocab_size: int, sentinels: Sequence[str] = ()) -> bytes:
    """BERT's WordPiece as a tokenizer.json.

    The library walks hash maps with random seeds (huggingface/tokenizers #1794): over characters, of which the rarest
    are left out, and over words, whose inner characters get ids as they are met; merges of equal counts go by ids. So
    it is given the characters, and the inner ones as tokens that are there from the start.
    """
    from tokenizers import BertWordPieceTokenizer, decoders

    bert = BertWordPieceTokenizer(lowercase=True)
    special = [*SPECIAL_TOKENS, *sentinels]
    alphabet, inner = _characters(map(bert.normalize, texts))
    bert.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*special, *(f"##{character}" for character in inner)],
        show_progress=True,
    )
    bert.decoder = decoders.WordPiece(cleanup=False)
    trained = json.loads(bert.to_str())
    trained["added_tokens"] = trained["added_tokens"][: len(special)]  # "##a" in a text is no token
    return json.dumps(trained, ensure_ascii=False).encode("utf-8")


def _characters(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them that stand within words, as BERT splits words."""
    counts: Counter[str] = Counter()
    neighbours: set[tuple[str, str]] = set()
    for text in texts:
        counts.update(text)
        neighbours.update(pairwise(text))
    alphabet = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:_ALPHABET]
    inner = {second for first, second in neighbours if not (_ends_word(first) or _ends_word(second))}
    return alphabet, sorted(inner.intersection(alphabet))


def _ends_word(character: str) -> bool:
    """White space, or punctuation as BERT has it: ASCII's symbols too."""
    symbol = character.isascii() and character.isprintable() and not character.isalnum()
    return character.isspace() or symbol or unicodedata.category(character).startswith("P")


def train_byte_bpe(texts: list[str], vocab_size: int, sentinels: Sequence[str] = ()) -> bytes:
    """Byte-level BPE as a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: tokenizers.Tokenizer = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *sentinels],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str().encode("utf-8")


def _sentences(texts: list[str]) -> Iterator[str]:
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= _SENTENCE_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
        yield "".join(lines)


def _train_sentencepiece(texts: list[str], vocab_size: int, sentinels: Sequence[str], model_type: str) -> bytes:
    import io

    import sentencepiece

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3,
            pad_piece=pad, unk_piece=unk, bos_piece=cls, eos_piece=sep, control_symbols=[mask, *sentinels],
            user_defined_symbols=_LINE_ENDS,
            # the library's defaults lose newlines and double spaces and put a space before the text
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            hard_vocab_limit=False,
            max_sentence_length=1 << 24,
            # fixed, because the sums of the training, and so its bytes, depend on it
            num_threads=8,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--vocab_size {vocab_size}: sentencepiece refuses ({reason}); try a smaller one") from error
    return model.getvalue()


def train_unigram(texts: list[str], vocab_size: int, sentinels: Sequence[str] = ()) -> bytes:
    """SentencePiece unigram as a tokenizer.model."""
    return _train_sentencepiece(texts, vocab_size, sentinels, "unigram")


def train_bpe(texts: list[str], vocab_size: int, sentinels: Sequence[str] = ()) -> bytes:
    """SentencePiece BPE as a tokenizer.model."""
    return _train_sentencepiece(texts, vocab_size, sentinels, "bpe")


KINDS: dict[str, Callable[..., bytes]] = {  # (texts, vocab_size, sentinels) -> the file
    "wordpiece": train_wordpiece,
    "unigram": train_unigram,
    "bpe": train_bpe,
    "byte_bpe": train_byte_bpe,
}


def read_texts(inputs: Sequence[str], max_bytes: float, strict: bool = False) -> tuple[list[str], str]:
    """Cleaned texts, up to `max_bytes`, and the sha256 of all of them. strict: see CleaningReport."""
    files = input_files(inputs)
    report = CleaningReport(strict=strict)
    texts: list[str] = []
    digest = hashlib.sha256()
    size = 0
    with progress(int(min(max_bytes, total_bytes(files))), "read text", "B") as bar:
        for document in clean_documents(read_documents(files, report), report):
            payload = document.text.encode("utf-8")
            digest.update(len(payload).to_bytes(8, "little") + payload)
            texts.append(document.text)
            size += len(payload)
            bar.update(document.raw_bytes)
            if size >= max_bytes:
                break
    if not texts:
        raise report.nothing_left()
    for line in report.lines():
        print(line)
    return texts, digest.hexdigest()


def finished_tokenizer(output: Path, wanted: dict[str, str | int], overwrite: bool) -> Tokenizer | None:
    """The tokenizer in `output` if it was trained as `wanted`; DataError if it is another one and may not go."""
    manifest = output / "manifest.json"
    if overwrite or not manifest.is_file():
        return None
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(output)
    except ValueError as error:
        raise DataError(f"{manifest}: damaged ({error}); add --overwrite to train again") from error
    if found != wanted | {"sha256": tokenizer.sha256}:
        raise DataError(f"{output}: holds a tokenizer of other text or settings; add --overwrite or change --output")
    return tokenizer


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("train_tokenizer", __doc__)
    parser.add_argument("--input", nargs="+", required=True, help="txt, jsonl, parquet or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--kind", choices=KINDS, default="wordpiece", help="default: wordpiece")
    parser.add_argument("--vocab_size", type=positive_int, default=30_522, help="default: 30522")
    parser.add_argument("--sentinels", type=positive_int, default=0, help="for span corruption, default: 0")
    parser.add_argument("--max_mb", type=positive_float, default=500.0, help="train on this much text, default: 500")
    add_strict(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer in OUTPUT")
    args = parser.parse(argv)
    check_output(args.output)

    from neomoba_dist.data.index import write_atomically
    from neomoba_dist.data.span_corruption import SENTINEL_NAMES

    texts, text_sha256 = read_texts(args.input, args.max_mb * 1e6, args.strict)
    wanted = {"kind": args.kind, "vocab_size": args.vocab_size, "text_sha256": text_sha256}
    if args.sentinels:
        wanted["sentinels"] = args.sentinels
    tokenizer = finished_tokenizer(args.output, wanted, args.overwrite)
    if tokenizer is None:
        pace = ", about 5 CPU seconds a million" if args.kind == "unigram" else ""
        print(f"training {args.kind} on {sum(map(len, texts)) / 1e6:.1f} M characters{pace} ...", flush=True)
        sentinels = [SENTINEL_NAMES[0].format(number) for number in range(args.sentinels)]
        payload = KINDS[args.kind](texts, args.vocab_size, sentinels)
        args.output.mkdir(parents=True, exist_ok=True)
        for stale in ("manifest.json", "tokenizer.json", "tokenizer.model"):
            (args.output / stale).unlink(missing_ok=True)
        name = "tokenizer.json" if payload.startswith(b"{") else "tokenizer.model"
        write_atomically(args.output / name, payload)
        tokenizer = load_tokenizer(args.output)
        manifest = json.dumps(wanted | {"sha256": tokenizer.sha256}, indent=1) + "\n"
        write_atomically(args.output / "manifest.json", manifest.encode("utf-8"))
    print(f"{args.output / tokenizer.file_name}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    run(main)
