"""Text that the tokenizer does not know: counted in the index, printed, warned of, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_tools import index as index_command
from data_tools import tokenize_corpus
from data_tools.corpus_index import unigram_entropy
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
from neomoba_dist.data.rows import Source
from neomoba_dist.data.shards import ShardWriter
from neomoba_dist.data.tokenizer import load_tokenizer
from neomoba_dist.train.assemble import Corpora
from tests.corpora import make_tokenizer

ENGLISH = ["this module is a class of some text ", "def return import name value and the others "] * 40
THAI = "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22"  # a word; WordPiece of English text knows none of its letters


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("wordpiece"), "wordpiece")


def make(tmp_path: Path, tokenizer: Path, texts: list[str], *flags: str) -> Corpus:
    """The corpus of these documents."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = ["--input", str(source), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    tokenize_corpus.main([*arguments, "--workers", "1", *flags])
    return open_corpus(tmp_path / "out")


def test_known_text_says_zero(tmp_path: Path, wordpiece: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make(tmp_path, wordpiece, ["".join(ENGLISH)])
    said = capsys.readouterr().out
    assert "0 unknown tokens (0.00%, for 0.00% of the text)" in said
    assert "warning" not in said
    assert Corpora([Source(corpus)], None, None).lines() == [
        f"neomoba.data.train: {corpus.name}, 1 documents, {corpus.tokens} tokens, "
        "0 unknown tokens (0.00%, for 0.00% of the text)"
    ]


def test_some_unknown_text_is_counted_exactly_and_warned_of(
    tmp_path: Path, wordpiece: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        *[f"{text}{i}" for i, text in enumerate(ENGLISH)],
        f"the {THAI} text",
        f"{THAI} {THAI} name",
        f"the {THAI} text",
    ]
    corpus = make(tmp_path, wordpiece, texts)
    said = capsys.readouterr().out
    unk = corpus.special.unk
    stored = corpus.tokens_at(0, corpus.tokens)
    ordinary = int(corpus.ordinary[stored].sum())
    assert unk is not None
    unknown = int((stored == unk).sum())
    assert (unknown, corpus.index.unknown_tokens) == (3, 3)  # the repeated document is dropped and does not count
    assert corpus.index.unknown_share == 3 / (ordinary + 3)
    visible = sum(len("".join(text.split())) for text in texts)
    assert corpus.index.unknown_text_share == 4 * len(THAI) / visible
    assert f"such as {THAI!r}; train one on this text" in said
    assert "warning: 4 of " in said
    (line,) = Corpora([Source(corpus)], corpus, None).lines()[:1]
    assert line.startswith("warning: neomoba.data.train: ")
    assert "3 unknown tokens" in line


@pytest.mark.parametrize("text", [THAI + " " + THAI, "x" * 3_000_000, "".join(ENGLISH) + "y" * 100_000])
def test_mostly_unknown_text_is_refused_unless_allowed(
    tmp_path: Path, wordpiece: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"--tokenizer: .* unknown to the tokenizer .* or add --allow-unknown$"):
        make(tmp_path, wordpiece, [text])
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    corpus = make(tmp_path, wordpiece, [text], "--allow_unknown")
    assert corpus.index.largest_unknown_share > 0.5
    said = capsys.readouterr().out
    assert "warning" in said
    assert "-0.000" not in said
    make(tmp_path, wordpiece, [text])  # finished: nothing to do, and it says so again
    assert f"{corpus.index.unknown_tokens} unknown tokens" in capsys.readouterr().out


def test_a_refusal_leaves_the_corpus_that_was_there(tmp_path: Path, wordpiece: Path) -> None:
    fingerprint = make(tmp_path, wordpiece, ENGLISH).fingerprint
    with pytest.raises(DataError, match="--allow-unknown"):
        make(tmp_path, wordpiece, [THAI], "--overwrite")
    assert open_corpus(tmp_path / "out").fingerprint == fingerprint


def test_sentencepiece_without_bytes(tmp_path: Path) -> None:
    """Its unigram models write a whole run of unknown characters as one token."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_prefix=str(tmp_path / "sp"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    text = f"the name {THAI * 5} value"
    tokenizer = load_tokenizer(tmp_path / "sp.model")
    ((start, stop),) = tokenizer.unknown_spans(text)
    assert text[start:stop] == THAI * 5
    with pytest.raises(DataError, match=r"1 of \d+ tokens are unknown .* 7\d\.\d+% of the text"):
        make(tmp_path, tmp_path / "sp.model", [text])


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe"])
def test_tokenizers_that_write_bytes_know_everything(tmp_path: Path, kind: str) -> None:
    corpus = make(tmp_path, make_tokenizer(tmp_path / "tokenizer", kind), [THAI * 50])
    assert (corpus.index.unknown_tokens, corpus.index.unknown_text_share) == (0, 0.0)


def test_ids_made_elsewhere(tmp_path: Path, wordpiece: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(wordpiece)
    writer = ShardWriter(tmp_path, "uint16", 1 << 20)
    writer.add(np.array(tokenizer.wrap_document([tokenizer.special.unk or 0] * 3 + [9])))
    writer.close()
    arguments = [str(tmp_path), "--tokenizer", str(wordpiece)]
    with pytest.raises(DataError, match=r"3 of 4 tokens are unknown to the tokenizer \(75.00% of the tokens\)"):
        index_command.main(arguments)
    index_command.main([*arguments, "--allow_unknown"])
    assert "3 unknown tokens (75.00%)" in capsys.readouterr().out
    assert open_corpus(tmp_path).index.unknown_text_share is None


def test_an_index_of_before_is_read(tmp_path: Path, wordpiece: Path) -> None:
    index = make(tmp_path, wordpiece, ENGLISH).index
    raw: dict[str, Any] = json.loads(index.to_json())
    for name in ("unknown_tokens", "unknown_share", "unknown_text_share"):
        del raw[name]
    older = CorpusIndex.from_bytes(json.dumps(raw).encode(), "index.json")
    assert (older.unknown, older.fingerprint) == ("unknown tokens not counted", index.fingerprint)


def test_entropy_of_one_kind_of_token_is_zero_without_a_sign() -> None:
    assert f"{unigram_entropy(np.array([0, 5, 0]), [0]):.3f}" == "0.000"
    assert f"{unigram_entropy(np.array([3, 0]), [0]):.3f}" == "0.000"
