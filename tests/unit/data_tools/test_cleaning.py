"""Cleaning: what every document goes through, and the command with its options."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_tools.text_folder as text_folder
from data_tools import clean, fetch, passkeys
from data_tools.cleaning import CleaningReport, Document, clean_text, decode_utf8
from data_tools.overlap import Contamination, NearDuplicates, bands_for, evaluation_texts
from data_tools.sources import input_files, read_documents
from neomoba_dist.data.errors import DataError
from tests.corpora import SHARED_DATA, folder_digests, standard_library_texts


def test_cleaning() -> None:
    dirty = "\ufeffa\r\nb\rc\x00\x1b[0m e\u0301\x85\ud800\tz\n"
    clean = "a\nb\nc[0m \u00e9\ufffd\tz\n"
    assert clean_text(dirty) == clean
    assert clean_text(clean) == clean
    report = CleaningReport()
    assert decode_utf8(b"\xef\xbb\xbfgood\nb\xffd\nok\n\xfe", "f.txt", report) == "good\nb\ufffdd\nok\n\ufffd"
    assert report.invalid_lines == ["f.txt:2", "f.txt:4"]
    assert "f.txt:2, f.txt:4" in report.lines()[0]


@given(st.text(st.one_of(st.characters(max_codepoint=0x17F), st.characters(), st.sampled_from("\r\n\ufeff\u0301"))))
def test_cleaning_against_its_definition(text: str) -> None:
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in expected)
    expected = "".join(c for c in expected if c in "\n\t" or unicodedata.category(c) != "Cc")
    assert clean_text(text) == unicodedata.normalize("NFC", expected).lstrip("\ufeff")
    assert clean_text(clean_text(text)) == clean_text(text)


def write_jsonl(path: Path, texts: Sequence[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def kept(folder: Path) -> list[str]:
    return [document.text for document in read_documents(input_files([folder]), CleaningReport())]


def test_command_drops_what_it_should_and_counts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    essay = " ".join(f"word{i}" for i in range(400))
    question = "who wrote the very long question that nobody has ever asked before today"
    texts = [
        "plain\r\n",
        "plain\n",
        " \x00 ",
        essay,
        essay.replace("word7 ", "other "),
        f"he said: {question.upper()}?",
    ]
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [*texts, "caf\u0065\u0301"])
    held_out = tmp_path / "eval.json"
    held_out.write_text(json.dumps({"data": [{"question": question, "id": "1"}, "short"]}), encoding="utf-8")
    common = ["--input", str(source), "--output"]

    clean.main([*common, str(tmp_path / "plain")])
    assert kept(tmp_path / "plain") == ["plain\n", *texts[3:], "caf\u00e9"]
    assert "dropped 1 empty, 1 repeated of 7 documents" in capsys.readouterr().out
    options = ["--near_duplicates", "0.8", "--decontaminate", str(held_out)]
    clean.main([*common, str(tmp_path / "all"), *options])
    assert kept(tmp_path / "all") == ["plain\n", essay, "caf\u00e9"]
    said = capsys.readouterr().out
    assert "dropped 1 empty, 1 repeated, 1 nearly repeated, 1 contaminated of 7 documents" in said
    assert "2 of 3 evaluation texts have fewer than --ngram 13 words" in said
    report = json.loads((tmp_path / "all" / "manifest.json").read_text(encoding="utf-8"))["report"]
    assert (report["near_duplicates"], report["contaminated"]) == (1, 1)
    clean.main([*common, str(tmp_path / "all"), *options])
    assert "already holds this text" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds text of another source or settings"):
        clean.main([*common, str(tmp_path / "all")])


def test_strict_stops_at_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_folder, "PART_BYTES", 1)
    (tmp_path / "a.txt").write_bytes(b"first\n")
    (tmp_path / "b.txt").write_bytes(b"good\nbad \xff\n")
    arguments = ["--input", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--output"]
    clean.main([*arguments, str(tmp_path / "lax")])
    assert kept(tmp_path / "lax") == ["first\n", "good\nbad \ufffd\n"]
    with pytest.raises(DataError, match=r"b.txt:2: invalid UTF-8"):
        clean.main([*arguments, str(tmp_path / "strict"), "--strict"])
    with pytest.raises(DataError, match="unfinished"):
        input_files([tmp_path / "strict"])


def test_interrupted_cleaning_remembers_what_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetitions stand behind the point of interruption, their originals before it."""
    monkeypatch.setattr(text_folder, "PART_BYTES", 4000)
    originals = [" ".join(f"{i}x{j}" for j in range(100)) for i in range(40)]
    near = [text.replace(f"{i}x5 ", "new ") for i, text in enumerate(originals)]
    mixed = [*originals[:3], None, *originals[3:], *originals[:5], None, *near[:5], "\x00", "the end"]
    source = write_jsonl(tmp_path / "in.jsonl", mixed)
    arguments = ["--input", str(source), "--near_duplicates", "0.8", "--output"]
    clean.main([*arguments, str(tmp_path / "whole")])
    assert kept(tmp_path / "whole") == [*originals, "the end"]
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["report"]["without_text"] == 2

    finish, parts = text_folder.TextFolder._finish_part, []

    def dies(self: text_folder.TextFolder) -> None:
        if len(parts) == 5:
            raise KeyboardInterrupt
        parts.append(finish(self))

    with monkeypatch.context() as patch:
        patch.setattr(text_folder.TextFolder, "_finish_part", dies)
        with pytest.raises(KeyboardInterrupt):
            clean.main([*arguments, str(tmp_path / "again")])
    cleaned: list[str] = []
    documents = clean.clean_documents

    def counts(given: object, report: CleaningReport, **options: object) -> object:
        for document in documents(given, report, **options):
            cleaned.append(document.text)
            yield document

    monkeypatch.setattr(clean, "clean_documents", counts)
    clean.main([*arguments, str(tmp_path / "again")])
    assert 0 < len(cleaned) < 30
    assert folder_digests(tmp_path / "again") == folder_digests(tmp_path / "whole")


def test_changed_input_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [f"text {i}" for i in range(50)])
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(text_folder, "PART_BYTES", 200)
    with monkeypatch.context() as patch:
        patch.setattr(text_folder.TextFolder, "close", lambda self, facts: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            clean.main(arguments)
    write_jsonl(source, [f"other text {i}" for i in range(50)])
    with pytest.raises(DataError, match="holds text of another source or settings; add --overwrite"):
        clean.main(arguments)
    clean.main([*arguments, "--overwrite"])
    assert kept(tmp_path / "out")[0] == "other text 0"
    before = folder_digests(tmp_path / "out")
    write_jsonl(source, ["", " "])
    with pytest.raises(DataError, match="no document left to write"):
        clean.main([*arguments, "--overwrite"])
    assert folder_digests(tmp_path / "out") == before, "a refused run replaces nothing"


def test_overwrite_goes_on_with_its_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command does, and it may say --overwrite; damaged parts and finished text are made anew."""
    source = write_jsonl(tmp_path / "in.jsonl", [f"text {i}" for i in range(50)])
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--overwrite"]
    monkeypatch.setattr(text_folder, "PART_BYTES", 200)
    with monkeypatch.context() as patch:
        patch.setattr(text_folder.TextFolder, "close", lambda self, facts: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            clean.main(arguments)
    recipe = json.loads((tmp_path / "out" / text_folder.UNFINISHED_FILE).read_text(encoding="utf-8"))["recipe"]
    folder = text_folder.TextFolder(tmp_path / "out", recipe, overwrite=True)
    assert folder.parts
    assert not folder.finished
    assert text_folder.TextFolder(tmp_path / "out", {**recipe, "ngram": 1}, overwrite=True).parts == []
    folder.files()[0].write_bytes(b"")
    assert text_folder.TextFolder(tmp_path / "out", recipe, overwrite=True).parts == []
    clean.main(arguments)
    assert kept(tmp_path / "out") == [f"text {i}" for i in range(50)]
    assert text_folder.TextFolder(tmp_path / "out", recipe, overwrite=True).parts == []


def test_text_does_not_replace_what_it_is_made_of(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a text"])
    clean.main(["--input", str(source), "--output", str(tmp_path / "out")])
    before = folder_digests(tmp_path / "out")
    again = [str(tmp_path / "out"), "--output", str(tmp_path / "in" / ".." / "out"), "--overwrite"]
    (tmp_path / "in").mkdir()
    for command, words in ((clean, ["--input"]), (fetch, ["--source"]), (passkeys, ["--documents", "1", "--input"])):
        with pytest.raises(DataError, match=r"holds documents-00000.jsonl.zst, which is to be read"):
            command.main([*words, *again])
    assert folder_digests(tmp_path / "out") == before


# -- overlap


@given(
    st.lists(st.text("abc ", max_size=30), min_size=1, max_size=4), st.text("abc .,", max_size=60), st.integers(1, 4)
)
def test_contamination_against_a_loop(held_out: list[str], text: str, n: int) -> None:
    def windows(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    expected = bool(windows(text) & set().union(*map(windows, held_out)))
    assert Contamination(held_out, n)(text) == expected


def test_evaluation_texts_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nit's \"quoted\tgood\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('x,"y,\nz"\n', encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", ["line"])
    (tmp_path / "d.json").write_text('{"a": ["deep", 3, {"b": "deeper"}]}', encoding="utf-8")
    (tmp_path / "e.txt").write_text("whole file", encoding="utf-8")
    assert evaluation_texts([str(tmp_path)]) == [
        *("sentence", "label", "it's \"quoted", "good", "x", "y,\nz", "line", "deep", "deeper", "whole file"),
    ]
    (tmp_path / "f.md").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"--decontaminate .*f.md: give txt, json"):
        evaluation_texts([str(tmp_path)])
    (tmp_path / "f.md").unlink()
    (tmp_path / "d.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"--decontaminate .*d.json: cannot be read"):
        evaluation_texts([str(tmp_path)])
    with pytest.raises(DataError, match="no such file"):
        evaluation_texts(["none"])


def test_contamination_of_real_sets() -> None:
    """A paragraph of the question-answering set inside a novel is found, the novel alone is not."""
    squad = SHARED_DATA / "qa" / "xquad.en.json"
    texts = evaluation_texts([str(squad)]) if squad.is_file() else list(standard_library_texts().values())
    book = " ".join(f"chapter {i} it was the best of times" for i in range(5000))
    test = Contamination(texts, 13)
    longest = max(texts, key=len)
    assert not test(book)
    assert test(book + longest[len(longest) // 2 :] + book)


def test_near_duplicates_by_similarity() -> None:
    words = [f"w{i}" for i in range(1000)]
    for changed, expected in ((5, True), (100, False)):
        # each changed word changes 5 shingles: similarity (1000 - 5 c) / (1000 + 5 c)
        near = NearDuplicates(0.8)
        assert not near(" ".join(words))
        altered = ["x" if i % (1000 // changed) == 0 else word for i, word in enumerate(words)]
        assert near(" ".join(altered)) == expected
        assert near(" ".join(words))


def test_bands_reach_below_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.99):
        bands = bands_for(threshold)
        assert 128 % bands == 0
        assert (1 / bands) ** (bands / 128) <= threshold


def test_one_document_is_no_duplicate_of_itself() -> None:
    report = CleaningReport()
    document = Document("a", "some text", 9)
    assert [d.text for d in clean.clean_documents([document, document], report)] == ["some text"]
    assert (report.documents, report.duplicates) == (2, 1)
