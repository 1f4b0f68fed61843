"""Makes a small text corpus, cleaned and split into train and validation by document.

Without --input it takes the text of this Python installation: sources and documentation of the standard library
(about 10 MB; several files are longer than 32k tokens). It needs no network. The same input gives the same bytes.
Writes OUTPUT/train/documents.jsonl, OUTPUT/validation/documents.jsonl ({"id", "text"} a line) and, last,
OUTPUT/manifest.json. The sample is held in memory: for large corpora give the text to tokenize_corpus itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.cleaning import CleaningReport, Document, clean_documents
from data_tools.cli import add_strict, check_output, command_parser, positive_float, progress, run
from data_tools.sources import SourceFile, input_files, read_documents, standard_library_files, total_bytes
from neomoba_dist.data.errors import DataError

VALIDATION_ONE_IN = 16
_CUT_SHARE = 0.9


def _rank(name: str) -> int:
    """A number that depends on the name alone: orders the files and decides on which side a document falls."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def take_documents(files: list[SourceFile], max_bytes: float, report: CleaningReport) -> list[Document]:
    """Cleaned documents in the order of their files' hashes, until `max_bytes` of text are reached."""
    files = sorted(files, key=lambda file: (_rank(file.name), file.name))
    taken: list[Document] = []
    size = 0
    with progress(int(min(max_bytes, total_bytes(files))), "sample", "B") as bar:
        for document in clean_documents(read_documents(files, report), report):
            taken.append(document)
            size += len(document.text.encode("utf-8"))
            bar.update(document.raw_bytes)
            if size >= max_bytes:
                break
    return taken


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Train and validation by the hash of each document's id. Neither is empty: with too few documents the one with
    the lowest hash validates, and of a single document the last tenth, cut at a line's end, does."""
    if len(documents) == 1:
        only = documents[0]
        cut = only.text.find("\n", int(len(only.text) * _CUT_SHARE)) + 1
        if cut <= 0 or not only.text[cut:].strip():
            raise DataError(f"--input: one document ({only.id}) and no line's end in its last tenth: give a second one")
        return {
            "train": [Document(f"{only.id}#head", only.text[:cut], 0)],
            "validation": [Document(f"{only.id}#tail", only.text[cut:], 0)],
        }
    ranks = [_rank(document.id) for document in documents]
    held_out = {i for i, rank in enumerate(ranks) if rank % VALIDATION_ONE_IN == 0}
    if not 0 < len(held_out) < len(documents):
        held_out = {ranks.index(min(ranks))}
    return {
        "train": [document for i, document in enumerate(documents) if i not in held_out],
        "validation": [document for i, document in enumerate(documents) if i in held_out],
    }


def write_split(folder: Path, documents: list[Document]) -> dict[str, int | str]:
    """Writes one side as jsonl and returns its line of the manifest."""
    from neomoba_dist.data.index import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents]
    payload = "".join(lines).encode("utf-8")
    write_atomically(folder / "documents.jsonl", payload)
    return {"documents": len(documents), "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("sample_corpus", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--input", nargs="+", help="txt, jsonl, parquet or folders (default: the standard library)")
    parser.add_argument("--max_mb", type=positive_float, default=float("inf"), help="stop at this much text, in MB")
    add_strict(parser)
    args = parser.parse(argv)
    check_output(args.output)

    from neomoba_dist.data.index import write_atomically

    files = input_files(args.input) if args.input else standard_library_files()
    report = CleaningReport(strict=args.strict)
    documents = take_documents(files, args.max_mb * 1e6, report)
    if not documents:
        raise report.nothing_left()
    splits = split_documents(documents)
    (args.output / "manifest.json").unlink(missing_ok=True)
    entries = {name: write_split(args.output / name, documents) for name, documents in splits.items()}
    source = "input files" if args.input else "Python standard library"
    manifest = {"format": "neomoba-text", "version": 1, "source": source, "splits": entries}
    write_atomically(args.output / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
    for line in report.lines():
        print(line)
    for name, entry in entries.items():
        print(f"{args.output / name}: {entry['documents']} documents, {int(entry['bytes']) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
