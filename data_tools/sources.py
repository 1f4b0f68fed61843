"""Where text comes from: txt, jsonl (plain, .gz, .zst) and parquet files or folders of them, indexed WebDataset shards
of raw text, and the text of this Python installation.

A txt file is one document; a line of jsonl, a row of parquet and a sample of a shard are one each, with the text under
"text" or "content".
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
            yield from _parquet(file)
        elif file.path.suffix == ".tar":
            yield from _shard(file, report)
        elif ".jsonl" in file.path.suffixes:
            yield from _jsonl(file, report)
        else:
            payload = file.path.read_bytes()
            yield Document(file.name, decode_utf8(payload, file.name, report), len(payload))


def _jsonl(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    position = 0
    with open(file.path, "rb") as raw:
        lines: Iterable[bytes] = raw
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix)
        if compression:
            import pyarrow

            lines = io.BufferedReader(pyarrow.input_stream(raw, compression=compression), 1 << 20)
        try:
            for number, line in enumerate(lines, 1):
                id, text = _record(line, f"{file.name}:{number}", file, report, number)
                reached = raw.tell() if compression else position + len(line)
                yield Document(id, text, reached - position)
                position = reached
        except OSError as error:
            raise DataError(f"{file.path}: damaged or cut ({error}); get the file again") from error


def _record(line: bytes, name: str, file: SourceFile, report: CleaningReport, first_line: int) -> tuple[str, str]:
    """(id, text) of a JSON object."""
    where = f"{file.path}{name.removeprefix(file.name)}"
    try:
        record: Any = json.loads(decode_utf8(line, file.name, report, first_line))
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error})") from error
    key = next((k for k in TEXT_KEYS if isinstance(record, dict) and isinstance(record.get(k), str)), None)
    if key is None:
        raise DataError(f"{where}: no text under {' or '.join(map(repr, TEXT_KEYS))}")
    return str(record.get("id", name)), record[key]


def _shard(file: SourceFile, report: CleaningReport) -> Iterator[Document]:
    from data_tools.foreign import TextIndex, text_payloads
    from neomoba_dist.data.index import INDEX_FILE

    suffix = TextIndex.from_file(file.path.parent / INDEX_FILE).suffix
    position = 0
    for offset, payload in text_payloads(file.path):
        name = f"{file.name}:{offset}"
        if suffix == "json":
            id, text = _record(bytes(payload), name, file, report, 1)
        else:
            id, text = name, decode_utf8(bytes(payload), name, report)
        yield Document(id, text, offset + len(payload) - position)
        position = offset + len(payload)


def _parquet(file: SourceFile) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        column = next((key for key in TEXT_KEYS if key in table.schema_arrow.names), None)
        if column is None:
            raise DataError(f"{file.path}: no column {' or '.join(map(repr, TEXT_KEYS))}")
        share = file.path.stat().st_size // max(1, table.metadata.num_rows)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield Document(f"{file.name}:{number}", text or "", share)
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path}: not a parquet file, or a damaged one ({error})") from error


def total_bytes(files: Iterable[SourceFile]) -> int:
    """Size of the files together."""
    return sum(file.path.stat().st_size for file in files)
