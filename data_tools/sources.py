"""Where text comes from: txt, jsonl and parquet files or folders of them, and the text of this Python installation.

A txt file is one document; a line of jsonl and a row of parquet are one each, with the text under "text" or "content".
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.clean import CleaningReport, Document, decode_utf8
from neomoba_dist.data.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
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
            found = sorted(p for p in given.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files += [SourceFile(path, path.relative_to(given).as_posix()) for path in found]
            if not found:
                raise DataError(f"--input {given}: no {', '.join(SUFFIXES)} file in this folder")
        elif not given.is_file():
            raise DataError(f"--input {given}: no such file or folder")
        elif given.suffix not in SUFFIXES:
            raise DataError(f"--input {given}: give {', '.join(SUFFIXES)} or a folder of them")
        else:
            files.append(SourceFile(given, given.name))
    return files


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
        if file.path.suffix == ".jsonl":
            yield from _jsonl(file, report)
        elif file.path.suffix == ".parquet":
            yield from _parquet(file)
        else:
            payload = file.path.read_bytes()
            yield Document(file.name, decode_utf8(payload, file.name, report), len(payload))


def _jsonl(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.path}:{number}"
            try:
                record = json.loads(decode_utf8(line, file.name, report, number))
            except ValueError as error:
                raise DataError(f"{where}: not a JSON object ({error})") from error
            key = next((k for k in TEXT_KEYS if isinstance(record, dict) and isinstance(record.get(k), str)), None)
            if key is None:
                raise DataError(f"{where}: no text under {' or '.join(map(repr, TEXT_KEYS))}")
            yield Document(str(record.get("id", f"{file.name}:{number}")), record[key], len(line))


def _parquet(file: SourceFile) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.path}: not a parquet file ({error})") from error
    column = next((key for key in TEXT_KEYS if key in table.schema_arrow.names), None)
    if column is None:
        raise DataError(f"{file.path}: no column {' or '.join(map(repr, TEXT_KEYS))}")
    share = file.path.stat().st_size // max(1, table.metadata.num_rows)
    number = 0
    for batch in table.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            yield Document(f"{file.name}:{number}", text or "", share)
            number += 1


def total_bytes(files: Iterable[SourceFile]) -> int:
    """Size of the files together."""
    return sum(file.path.stat().st_size for file in files)
