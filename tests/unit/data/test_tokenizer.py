"""Tokenizers: round trips of each kind, foreign formats without network, special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tests.corpora import SHARED_DATA, make_tokenizer, standard_library_texts

ODD_TEXT = "a\n\n b  c\n    def f(self):\n\t\treturn 'é ü 漢字 😀'\r\n [MASK] [CLS] <|endoftext|> "


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> folder of a tokenizer trained on standard-library text."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make_tokenizer(root / kind, kind) for kind in ("wordpiece", "unigram", "bpe", "byte_bpe")}


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte_bpe"])
def test_exact_kinds_give_the_text_back(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    for text in [ODD_TEXT, *standard_library_texts().values()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_wordpiece_keeps_every_character_but_case_and_white_space(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizers["wordpiece"])
    for text in standard_library_texts().values():
        # words beyond 100 characters are [UNK] in BERT's scheme
        words = [word for word in text.split() if word.isascii() and word.isprintable() and len(word) < 100]
        decoded = tokenizer.decode(tokenizer.encode(" ".join(words)))
        assert "".join(decoded.split()) == "".join(words).lower()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "byte_bpe"])
def test_special_tokens_stand_first_and_never_come_from_text(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    special = tokenizer.special
    assert (special.pad, special.unk, special.cls, special.sep, special.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.reserved_ids() == [0, 1, 2, 3, 4]
    ids = tokenizer.encode("plain [MASK] text [SEP] [PAD]")
    assert ids
    assert min(ids) > 4
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.wrap_document(ids) == [2, *ids, 3]
    assert "[CLS]" in tokenizer.decode([2, *ids])
    assert "[MASK]" in tokenizer.decode([4])


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "byte_bpe"])
def test_batch_save_and_load_agree(tokenizers: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    texts = [text[:2000] for text in standard_library_texts().values()]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_arrays([*texts, ""])] == tokenizer.encode_batch([*texts, ""])
    again = load_tokenizer(tokenizer.save(tmp_path / "copy").parent)
    assert again.sha256 == tokenizer.sha256
    assert again.encode(texts[0]) == tokenizer.encode(texts[0])


def test_bert_vocabulary_file(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    vocab_file = SHARED_DATA / "vocab" / "bert-base-uncased-vocab.txt"
    trained = json.loads((tokenizers["wordpiece"] / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    if not vocab_file.is_file():
        vocab_file = tmp_path / "vocab.txt"
        vocab_file.write_text("\n".join(sorted(trained, key=trained.__getitem__)) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(vocab_file)
    names = vocab_file.read_text(encoding="utf-8").splitlines()
    assert tokenizer.vocab_size == len(names)
    assert [tokenizer.token(i) for i in tokenizer.encode("Import THIS")] == ["import", "this"]
    assert tokenizer.special.mask == names.index("[MASK]")
    unused = [i for i, name in enumerate(names) if name.startswith("[unused")]
    assert set(unused) < set(tokenizer.reserved_ids())


def test_cased_vocabulary_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "Paris", "paris"]), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("Paris paris") == [5, 6]


def test_gpt2_files(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    encoder = SHARED_DATA / "vocab" / "gpt2-encoder.json"
    if not encoder.is_file():
        model = json.loads((tokenizers["byte_bpe"] / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        tokens = [token for token in model["vocab"] if token not in SPECIAL_TOKENS]  # GPT-2 has none of ours
        vocab = {token: place for place, token in enumerate([*tokens, "<|endoftext|>"])}
        encoder = tmp_path / "gpt2-encoder.json"
        encoder.write_text(json.dumps(vocab), encoding="utf-8")
        merges = [" ".join(merge) for merge in model["merges"]]
        (tmp_path / "gpt2-vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    tokenizer = load_tokenizer(encoder)
    end = json.loads(encoder.read_text(encoding="utf-8"))["<|endoftext|>"]
    assert tokenizer.vocab_size == end + 1
    assert tokenizer.decode(tokenizer.encode(ODD_TEXT)) == ODD_TEXT
    assert end not in tokenizer.encode(ODD_TEXT)
    assert tokenizer.special.mask is None
    assert tokenizer.special.padding == end
    assert tokenizer.wrap_document([5, 6]) == [5, 6, end]
    assert load_tokenizer(tokenizer.save(tmp_path / "copy")).special == tokenizer.special


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a usable tokenizer file"),
        ("tokenizer.model", "rubbish", "not a usable tokenizer file"),
        ("vocab.txt", "hello\nworld\n", "[PAD], [UNK], [CLS], [SEP], [MASK] missing"),
        ("encoder.json", "{}", "vocab.bpe is missing"),
        ("notes.md", "", "holds no tokenizer"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python -m data_tools\.train_tokenizer"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte_bpe"])
def test_the_one_character_that_sentencepiece_loses(tmp_path: Path, kind: str) -> None:
    """Its own sign for a space; said in docs/data.md and in the help of train_tokenizer."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind))
    text = "a\u2581b \u2582 \u00e9\n\n  \U0001f600"
    kept = text if kind == "byte_bpe" else text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == kept
