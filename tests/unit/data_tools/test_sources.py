"""Fetching and reading text: files of every kind, foreign shards, data sets of the hub (as local folders of them)."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import data_tools.text_folder as text_folder
from data_tools import clean, fetch, index, sample_corpus, tokenize_corpus, train_tokenizer
from data_tools.cleaning import CleaningReport
from data_tools.sources import input_files, read_documents
from data_tools.text_folder import UNFINISHED_FILE
from neomoba_dist.data.errors import DataError
from tests.corpora import folder_digests, make_tokenizer


def texts_in(folder: Path) -> list[str]:
    return [document.text for document in read_documents(input_files([folder]), CleaningReport())]


def test_every_kind_of_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"text a\n")
    lines = b'{"text": "b1"}\n{"id": 7, "content": "b2"}\n'
    (folder / "sub" / "b.jsonl").write_bytes(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(folder / "e.jsonl.zst", compression="zstd") as stream:
        stream.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["c1", None, "c2"]}), folder / "c.parquet")
    (folder / "ignored.md").write_text("no", encoding="utf-8")
    files = input_files([folder])
    documents = list(read_documents(files, CleaningReport()))
    assert [(d.id, d.text) for d in documents] == [
        ("a.txt", "text a\n"),
        ("c.parquet:0", "c1"),
        ("c.parquet:2", "c2"),
        ("d.jsonl.gz:1", "b1"),
        ("7", "b2"),
        ("e.jsonl.zst:1", "b1"),
        ("7", "b2"),
        ("sub/b.jsonl:1", "b1"),
        ("7", "b2"),
    ]
    assert sum(d.raw_bytes for d in documents[3:7]) == sum((folder / n).stat().st_size for n in _COMPRESSED)


_COMPRESSED = ("d.jsonl.gz", "e.jsonl.zst")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": 1}', r"bad.jsonl:1: no text under 'text' or 'content'"),
        ("bad.jsonl", b'{"text": "a"}\n{', r"bad.jsonl:2: not a JSON object"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-9], r"bad.jsonl.gz: damaged or cut"),
        ("bad.jsonl.zst", b"rubbish", r"bad.jsonl.zst: damaged or cut"),
        ("bad.parquet", b"rubbish", r"bad.parquet: not a parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_in(tmp_path)


RECORDS = [{"text": "a"}, {"text": None}, {"text": None, "content": "b"}, {"text": "c"}]
WRONG = [{"text": 7}, {"text": ["x"]}, {"body": "x"}, {"text": {"x": "y"}}, "x", None]


def write_records(folder: Path, kind: str, records: list[Any]) -> Path:
    """One file of these records."""
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [record["text"] for record in records]}), path)
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number, record in enumerate(records):
                member = tarfile.TarInfo(f"{number}.json")
                payload = json.dumps(record).encode()
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
        index.main([str(folder)])
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "place"), [("jsonl", "a.jsonl:2"), ("parquet", "a.parquet:1"), ("tar", "a.tar:")])
def test_a_record_without_text_is_left_out_counted_and_named(tmp_path: Path, kind: str, place: str) -> None:
    records = [{"text": "a"}, {"text": None}, {"text": None}, {"text": "c"}]
    path = write_records(tmp_path, kind, records)
    report = CleaningReport()
    documents = list(read_documents(input_files([tmp_path]), report))
    assert [document.text for document in documents] == ["a", "c"]
    (line,) = report.lines()
    assert line.startswith(f"left out 2 records without text, the first: {tmp_path / place}")
    assert line.endswith("no text under 'text' or 'content' ('text' is null)")
    if kind == "jsonl":
        assert sum(document.raw_bytes for document in documents) == path.stat().st_size
    with pytest.raises(DataError, match=rf"{place}.*'text' is null\); repair the file or leave --strict out"):
        list(read_documents(input_files([tmp_path]), CleaningReport(strict=True)))


def test_wrong_types_and_missing_keys_are_treated_like_null(tmp_path: Path) -> None:
    write_records(tmp_path, "jsonl", [*RECORDS, *WRONG])
    report = CleaningReport()
    assert [d.text for d in read_documents(input_files([tmp_path]), report)] == ["a", "b", "c"]
    assert report.without_text == 1 + len(WRONG)


@pytest.mark.parametrize(
    "values", [[["a"], ["b"]], [1, 2], [1.5, 2.0], [True, False], [{"a": 1}, {"a": 2}], [b"a", b"b"]]
)
def test_a_parquet_column_of_another_type_is_one_line(tmp_path: Path, values: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    kind = re.escape(str(pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type))
    with pytest.raises(DataError, match=rf"a.parquet: column 'text' holds {kind}, not strings$"):
        texts_in(tmp_path)


def test_parquet_takes_the_column_that_holds_strings(tmp_path: Path) -> None:
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3], "content": words}), tmp_path / "a.parquet")
    assert texts_in(tmp_path) == ["a", "b", "a"]


@pytest.mark.parametrize("command", [clean, sample_corpus, train_tokenizer, tokenize_corpus, fetch])
def test_every_command_that_reads_text_has_strict(
    tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path, "jsonl", [{"text": f"a text of words {i}"} for i in range(200)] + [{"text": None}])
    flag = "--source" if command is fetch else "--input"
    arguments = [flag, str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    if command is tokenize_corpus:
        arguments += ["--tokenizer", str(make_tokenizer(tmp_path / "tokenizer", "byte_bpe")), "--workers", "1"]
    if command is train_tokenizer:
        arguments += ["--kind", "byte_bpe", "--vocab_size", "400"]
    with pytest.raises(DataError, match=r"a.jsonl:201: .*'text' is null\); repair the file or leave --strict out"):
        command.main([*arguments, "--strict"])
    capsys.readouterr()
    command.main([*arguments, *(["--overwrite"] if command in (clean, fetch) else [])])
    assert "left out 1 records without text, the first: " in capsys.readouterr().out


@pytest.mark.parametrize("command", [clean, sample_corpus, train_tokenizer, tokenize_corpus, fetch])
def test_an_output_that_is_a_file_is_said_before_the_work(tmp_path: Path, command: ModuleType) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    flag = "--source" if command is fetch else "--input"
    arguments = [flag, "nowhere", "--output", str(tmp_path / "out" / "below")]
    arguments += ["--tokenizer", "nowhere"] if command is tokenize_corpus else []
    with pytest.raises(DataError, match=r"--output .*below: .*out is not a folder; give another folder"):
        command.main(arguments)


def test_nothing_but_null_says_what_was_left_out(tmp_path: Path) -> None:
    write_records(tmp_path, "jsonl", [{"text": None}] * 3)
    with pytest.raises(DataError, match="no text left after cleaning; left out 3 records without text, the first: "):
        train_tokenizer.main(["--input", str(tmp_path), "--output", str(tmp_path / "out")])


def test_invalid_utf8_names_the_line_in_compressed_files_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b\xff"}\n'))
    report = CleaningReport()
    assert [d.text for d in read_documents(input_files([tmp_path]), report)] == ["a", "b\ufffd"]
    assert report.invalid_lines == ["a.jsonl.gz:2"]


# -- fetch


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_folder, "PART_BYTES", 3000)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set as the hub stores it: a card that names a configuration, parquet files in parts."""
    folder = tmp_path / "set"
    (folder / "cfg").mkdir(parents=True)
    for part in range(3):
        texts = [f"text {part} {i} " + "word " * 20 for i in range(50)]
        table = pyarrow.table({"url": ["u"] * 50, "content": texts})
        pyarrow.parquet.write_table(table, folder / "cfg" / f"train-{part:05d}-of-00003.parquet", row_group_size=20)
    card = "---\nconfigs:\n- config_name: cfg\n  data_files:\n  - split: train\n    path: cfg/train-*\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, documents: int) -> None:
    """The process dies while it adds this document."""
    add = text_folder.TextFolder.add
    left = [documents]

    def dies(self: text_folder.TextFolder, *arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        add(self, *arguments)

    monkeypatch.setattr(text_folder.TextFolder, "add", dies)


@pytest.mark.usefixtures("small_parts")
def test_fetch_from_the_hub_goes_on_where_it_stopped(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--source", f"hf:{hub}:cfg@main", "--output"]
    fetch.main([*source, str(tmp_path / "whole")])
    expected = [f"text {part} {i} " + "word " * 20 for part in range(3) for i in range(50)]
    assert texts_in(tmp_path / "whole") == expected
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["documents"], len(manifest["parts"]) > 5) == (150, True)
    assert manifest["commit"] in capsys.readouterr().out

    with monkeypatch.context() as patch:
        interrupt_after(patch, 77)
        with pytest.raises(Interrupted):
            fetch.main([*source, str(tmp_path / "again")])
    assert (tmp_path / "again" / UNFINISHED_FILE).is_file()
    with pytest.raises(DataError, match="unfinished; run the command that writes it again"):
        input_files([tmp_path / "again"])
    read: list[int] = []
    documents = fetch.hub_documents
    monkeypatch.setattr(
        fetch, "hub_documents", lambda data, name, done: (read.append(done), documents(data, name, done))[1]
    )
    fetch.main([*source, str(tmp_path / "again")])
    assert 50 < read[0] < 77
    assert folder_digests(tmp_path / "again") == folder_digests(tmp_path / "whole")
    fetch.main([*source, str(tmp_path / "again")])
    assert "already holds this text" in capsys.readouterr().out


@pytest.mark.usefixtures("small_parts")
def test_fetch_of_local_files_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": f"text {i} " + "word " * 20}) for i in range(100)]
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "in" / "b.txt").write_text("the last one", encoding="utf-8")
    source = ["--source", str(tmp_path / "in"), "--output"]
    fetch.main([*source, str(tmp_path / "whole")])
    assert texts_in(tmp_path / "whole") == [f"text {i} " + "word " * 20 for i in range(100)] + ["the last one"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 60)
        with pytest.raises(Interrupted):
            fetch.main([*source, str(tmp_path / "again")])
    fetch.main([*source, str(tmp_path / "again")])
    assert folder_digests(tmp_path / "again") == folder_digests(tmp_path / "whole")


def test_fetch_leaves_out_what_has_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_folder, "PART_BYTES", 300)
    rows = [None if i % 3 == 1 else f"text {i} " + "word " * 20 for i in range(30)]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "set" / "train.parquet")
    source = ["--source", f"hf:{tmp_path / 'set'}@main", "--output"]
    fetch.main([*source, str(tmp_path / "whole")])
    assert texts_in(tmp_path / "whole") == [row for row in rows if row]
    assert "left out 10 records without text, the first: --source hf:" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_after(patch, 11)
        with pytest.raises(Interrupted):
            fetch.main([*source, str(tmp_path / "again")])
    fetch.main([*source, str(tmp_path / "again")])
    assert folder_digests(tmp_path / "again") == folder_digests(tmp_path / "whole")
    with pytest.raises(DataError, match="row 1: 'text' is null; repair the file"):
        fetch.main([*source, str(tmp_path / "strict"), "--strict"])
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]]}), tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds List, not strings"):
        fetch.main([*source, str(tmp_path / "lists")])


def test_fetch_limit_and_other_text(tmp_path: Path, hub: Path) -> None:
    source, output = ["--source", f"hf:{hub}:cfg@main"], ["--output", str(tmp_path / "out")]
    fetch.main([*source, *output, "--max_mb", "0.001"])
    assert len(texts_in(tmp_path / "out")) == 10  # 109 bytes each
    with pytest.raises(DataError, match="holds text of another source or settings; add --overwrite"):
        fetch.main([*source, *output])
    fetch.main([*source, *output, "--overwrite"])
    assert len(texts_in(tmp_path / "out")) == 150


def test_presets_are_pinned_parquet_sets_of_the_hub() -> None:
    assert set(fetch.PRESETS) == {"bookcorpus", "pg19", "refinedweb", "wikipedia", "wikitext-103"}
    for source in fetch.PRESETS.values():
        spec = fetch._HUB.fullmatch(source)
        assert spec
        assert len(spec["revision"]) == 40 or spec["revision"] == "refs/convert/parquet"


def test_offline_is_one_line_that_names_the_local_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be had .*wikitext.*give the files, --source FOLDER") as error:
        fetch.main(["--source", "wikitext-103", "--output", str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["hf:name/without_revision"], "write hf:NAME"),
        (["wikipedia", "pg19"], "give one data set of the hub alone"),
        (["no/such/file.txt"], "no such file or folder"),
        (["hf:{set}:cfg@main", "--split", "test"], "cannot be had .*test"),
        (["hf:{jsonl}@main"], "not stored as parquet; try hf:.*@refs/convert/parquet"),
        (["hf:{other}@main"], "no column 'text' or 'content', only a, b"),
    ],
)
def test_fetch_refuses_in_one_line(tmp_path: Path, hub: Path, source: list[str], message: str) -> None:
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "other").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), tmp_path / "other" / "train.parquet")
    places = {"set": hub, "jsonl": tmp_path / "jsonl", "other": tmp_path / "other"}
    with pytest.raises(DataError, match=message) as error:
        fetch.main(["--output", str(tmp_path / "out"), "--source", *(word.format(**places) for word in source)])
    assert "\n" not in str(error.value)
