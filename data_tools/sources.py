"""Where text comes from: txt, jsonl (plain, .gz, .zst) and parquet files or folders of them, indexed WebDataset shards
of raw text, and the text of this Python installation.

A txt file is one document; a line of jsonl, a row of parquet and a sample of a shard are one each, with the text under
"text" or "content". A record whose text is missing, null or not a string is left out and counted, in all of them alike;
a file in which no record has a text that is a string or null is refused.
"""

from __future__ import annotations

import io
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.cleaning import CleaningReport, Document, decode_utf8
from neomoba_dist.data.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_KEYS = ("text", "content")

# Of the standard library: no installed packages, no tests (Debian ships none), no build settings of this machine,
# no generated tables of character codes.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize")


@dataclass(frozen=True)
class SourceFile:
    """One file and the name by which its documents are called; names do not depend on where the file lies."""

    path: Path
    name: str


def input_files(inputs: Iterable[str | Path]) -> list[SourceFile]:
    """The readable files among `inputs` (files, or folders searched to the bottom), sorted inside each folder."""
    files: list[SourceFile] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = _files_in(given)
            files += [SourceFile(path, path.relative_to(given).as_posix()) for path in found]
            if not found:
                raise DataError(
                    f"--input {given}: no {', '.join(SUFFIXES)} file in this folder (a folder of WebDataset shards of "
                    "raw text needs an index: python -m data_tools.index)"
                )
        elif not given.is_file():
            raise DataError(f"--input {given}: no such file or folder")
        elif not given.name.endswith(SUFFIXES):
            raise DataError(f"--input {given}: give {', '.join(SUFFIXES)} or a folder of them")
        else:
            files.append(SourceFile(given, given.name))
    return files


def refuse_input_in(output: Path, files: Iterable[SourceFile]) -> None:
    """DataError if a file that is read lies in the folder that is written: new text would replace it unread."""
    if inside := next((file.path for file in files if file.path.resolve().parent == output.resolve()), None):
        raise DataError(f"--output {output}: holds {inside.name}, which is to be read; give another folder")


def _files_in(folder: Path) -> list[Path]:
    """The readable files of a folder; of one with an index of raw text, its shards."""
    from data_tools.foreign import TextIndex, is_text_index
    from data_tools.text_folder import UNFINISHED_FILE
    from neomoba_dist.data.index import INDEX_FILE
    from neomoba_dist.data.shards import check_files

    if (folder / UNFINISHED_FILE).is_file():
        raise DataError(
            f"--input {folder}: unfinished; run the command that writes it again, it goes on where it stopped"
        )
    if is_text_index(folder / INDEX_FILE):
        index = TextIndex.from_file(folder / INDEX_FILE)
        check_files(folder, index.shards)
        return [folder / shard.file for shard in index.shards]
    return sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())


def standard_library_files() -> list[SourceFile]:
    """Sources, documentation and licence of the Python that runs this, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)]
        for name in names:
            path = Path(folder, name)
            if path.suffix in (".py", ".txt") and not name.startswith(_SKIPPED_PREFIXES) and path.is_file():
                files.append(SourceFile(path, path.relative_to(root).as_posix()))
    if not files:
        raise DataError(f"{root}: this Python has no source files of its standard library; give --input instead")
    return sorted(files, key=lambda file: file.name)


def read_documents(files: Iterable[SourceFile], report: CleaningReport) -> Iterator[Document]:
    """The documents of `files` in order, not yet cleaned. DataError names file and line of what cannot be read."""
    for file in files:
        if file.path.suffix == ".parquet":
            yield from _parquet(file, report)
        elif file.path.suffix == ".tar":
            yield from _shard(file, report)
        elif ".jsonl" in file.path.suffixes:
            yield from _jsonl(file, report)
        else:
            payload = file.path.read_bytes()
            yield Document(file.name, decode_utf8(payload, file.name, report), len(payload))


class _Texts:
    """The texts of one file's records."""

    def __init__(self, report: CleaningReport) -> None:
        self._report = report
        self._with_text = self._null = self._without = 0
        self._first = ""

    def of(self, record: Any, where: str) -> str | None:
        """The record's text; None, noted in the report, if it has none."""
        values = {key: record[key] for key in TEXT_KEYS if key in record} if isinstance(record, dict) else {}
        text = next((value for value in values.values() if isinstance(value, str)), None)
        if text is not None:
            self._with_text += 1
            return text
        reason = f"no text under {' or '.join(map(repr, TEXT_KEYS))}"
        if values:
            reason += f" ({', '.join(f'{key!r} is {_type_name(value)}' for key, value in values.items())})"
        if None in values.values():
            self._null += 1
        else:
            self._without += 1
            self._first = self._first or f"{where}: {reason}"
        self._report.no_text(where, reason)
        return None

    def finish(self) -> None:
        """DataError if the file has records, but none whose text is a string or null: it is not a file of texts."""
        if self._without and not self._with_text + self._null:
            raise DataError(f"{self._first}; the same in all {self._without} records of this file: rename its key")


def _type_name(value: Any) -> str:
    """A JSON value's type in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def read_records(files: Iterable[SourceFile], report: CleaningReport) -> Iterator[tuple[str, Any, int]]:
    """(file:line, what stands there, bytes of the file that it takes) of every line of jsonl files. DataError names the
    file and line of what cannot be read."""
    for file in files:
        position = 0
        for number, line, reached in _lines(file):
            where = f"{file.path}:{number}"
            yield where, _parsed(line, where, file, report, number), reached - position
            position = reached


def _jsonl(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    position = 0
    texts = _Texts(report)
    for number, line, reached in _lines(file):
        id, text = _record(line, f"{file.name}:{number}", file, texts, report, number)
        if text is not None:
            yield Document(id, text, reached - position)
            position = reached
    texts.finish()


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes of the file read up to its end) of a jsonl file, perhaps a compressed one."""
    with open(file.path, "rb") as raw:
        lines: Iterable[bytes] = raw
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix)
        if compression:
            import pyarrow

            lines = io.BufferedReader(pyarrow.input_stream(raw, compression=compression), 1 << 20)
        read = 0
        try:
            for number, line in enumerate(lines, 1):
                read += len(line)
                yield number, line, raw.tell() if compression else read
        except OSError as error:
            raise DataError(f"{file.path}: damaged or cut ({error}); get the file again") from error


def _parsed(line: bytes, where: str, file: SourceFile, report: CleaningReport, number: int) -> Any:
    """What a line of JSON says."""
    try:
        return json.loads(decode_utf8(line, file.name, report, number))
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error})") from error


def _record(
    line: bytes, name: str, file: SourceFile, texts: _Texts, report: CleaningReport, first_line: int
) -> tuple[str, str | None]:
    """(id, text) of a JSON object; the text is None where it has none."""
    where = f"{file.path}{name.removeprefix(file.name)}"
    record = _parsed(line, where, file, report, first_line)
    text = texts.of(record, where)
    return (name if text is None else str(record.get("id", name))), text


def _shard(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    from data_tools.foreign import TextIndex, text_payloads
    from neomoba_dist.data.index import INDEX_FILE

    suffix = TextIndex.from_file(file.path.parent / INDEX_FILE).suffix
    position = 0
    texts = _Texts(report)
    for offset, payload in text_payloads(file.path):
        name = f"{file.name}:{offset}"
        id: str
        text: str | None
        if suffix == "json":
            id, text = _record(bytes(payload), name, file, texts, report, 1)
        else:
            id, text = name, decode_utf8(bytes(payload), name, report)
        if text is not None:
            yield Document(id, text, offset + len(payload) - position)
            position = offset + len(payload)
    texts.finish()


def _parquet(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    texts = _Texts(report)
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        schema = table.schema_arrow
        columns = [key for key in TEXT_KEYS if key in schema.names]
        if not columns:
            raise DataError(f"{file.path}: no column {' or '.join(map(repr, TEXT_KEYS))}")
        column = next((key for key in columns if _is_text(schema.field(key).type)), None)
        if column is None:
            raise DataError(f"{file.path}: column {columns[0]!r} holds {schema.field(columns[0]).type}, not strings")
        share = file.path.stat().st_size // max(1, table.metadata.num_rows)
        number, waiting = 0, 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                text = texts.of({column: value}, f"{file.path}:{number}")
                waiting += share
                if text is not None:
                    yield Document(f"{file.name}:{number}", text, waiting)
                    waiting = 0
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path}: not a parquet file, or a damaged one ({error})") from error


def _is_text(type: Any) -> bool:
    """Whether a column of this arrow type holds strings, or nothing but nulls."""
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    return any(test(type) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def total_bytes(files: Iterable[SourceFile]) -> int:
    """Size of the files together."""
    return sum(file.path.stat().st_size for file in files)
