"""Texts with passkeys: what they say, that the needle task asks in the same tokens, the same bytes again."""

import random
import re
from pathlib import Path

import pytest

from data_tools import passkeys
from data_tools.cleaning import CleaningReport
from data_tools.sources import input_files, read_documents
from evals.passkey import make_prompt
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_tokenizer

WORDS = [f"word{i}" for i in range(300)]


def test_what_a_text_says() -> None:
    counts, mentions, where = set(), set(), []
    for number in range(200):
        text = passkeys.write_text(WORDS, 4, 64, 3, random.Random(number))
        keys = re.findall(r"The passkey is((?: \d){5})\.", text)
        assert len(set(keys)) == 1, "one key in a text"
        assert text.endswith(f" What is the passkey? The passkey is{keys[0]}.")
        assert text.count("Remember the passkey.") == 1
        told = r"( What is the passkey\?)? ?The passkey is[\d ]+\.( Remember the passkey\.)?"
        rest = re.sub(told, "", text).split()
        first = int(rest[0].removeprefix("word"))
        assert rest == WORDS[first : first + len(rest)], "the passage goes on behind each mention"
        counts.add(len(rest))
        mentions.add(len(keys))
        where.append(text.index("Remember") / len(text))
    assert min(counts) == 4
    assert 60 < max(counts) <= 64
    assert mentions == {2, 3, 4, 5}, "the needle, the answer, and up to three copies"
    assert min(where) < 0.2
    assert max(where) > 0.6


def test_the_needle_task_asks_in_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, "wordpiece"))
    prompt = make_prompt(tokenizer, mask=False, key_digits=passkeys.KEY_DIGITS)
    text = passkeys.write_text(["text"], 1, 1, 0, random.Random(0))
    key = [int(digit) for digit in re.findall(r"\d", text)[-passkeys.KEY_DIGITS :]]
    tokens = tokenizer.encode(text)
    spelt = prompt.digits[key].tolist()
    found = [at for at in range(len(tokens)) if tokens[at : at + len(spelt)] == spelt]
    assert len(found) == 2
    ask = prompt.questions[0][0]
    assert tokens[found[1] - len(ask) : found[1]] == ask


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "text.txt"
    source.write_text(" ".join(WORDS))
    words = ["--input", str(source), "--documents", "40", "--words", "4", "32", "--copies", "2"]
    for name in ("one", "two"):
        passkeys.main([*words, "--output", str(tmp_path / name)])
    passkeys.main([*words, "--output", str(tmp_path / "one")])
    assert "whole already" in capsys.readouterr().out
    one, two = (next((tmp_path / name).glob("documents-*")).read_bytes() for name in ("one", "two"))
    assert one == two
    texts = [document.text for document in read_documents(input_files([tmp_path / "one"]), CleaningReport())]
    assert len(texts) == 40
    assert all("What is the passkey?" in text for text in texts)
    with pytest.raises(DataError, match="another source or settings; add --overwrite"):
        passkeys.main([*words, "--output", str(tmp_path / "one"), "--seed", "1"])


def test_made_up_words(tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        words = ["--documents", "3", "--words", "20", "20", "--digits", "2", "--seed", seed]
        passkeys.main([*words, "--output", str(tmp_path / name)])
    one, again, two = (next((tmp_path / name).glob("documents-*")).read_bytes() for name in ("one", "again", "two"))
    assert one == again != two
    for document in read_documents(input_files([tmp_path / "one"]), CleaningReport()):
        assert re.fullmatch(r"([bdgk][aeiou][bdgk][aeiou] |The passkey is( \d){2}\. |Remember the passkey\. )+"
                            r"What is the passkey\? The passkey is( \d){2}\.", document.text)  # fmt: skip


def test_passages_to_hide_keys_in() -> None:
    text = passkeys.write_text(WORDS, 9, 9, 3, random.Random(0), digits=0)
    first = int(text.split()[0].removeprefix("word"))
    assert text == " ".join(WORDS[first : first + 9])


def test_bad_word_ranges() -> None:
    with pytest.raises(DataError, match="--words 9 4: give the smaller number first"):
        passkeys.main(["--input", "x", "--output", "y", "--documents", "1", "--words", "9", "4"])
