"""Cleans text once, for everything that follows.

Byte order marks, CRLF, control characters and invalid UTF-8 go, Unicode becomes NFC, records without text, empty
documents and exact repetitions are dropped; where asked for, near repetitions and documents that share text with
evaluation sets too.
Writes OUTPUT/documents-*.jsonl.zst and, last, OUTPUT/manifest.json with the counts. An interrupted run goes on behind
its last finished part. train_tokenizer and tokenize_corpus clean what they read in the same way, without the last two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.cleaning import CLEANING_VERSION, CleaningReport, Document, clean_documents, text_digest
from data_tools.cli import add_strict, check_output, command_parser, positive_float, positive_int, progress, run
from data_tools.sources import SourceFile, input_files, read_documents, refuse_input_in, total_bytes
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from data_tools.text_folder import TextFolder


def file_facts(files: list[SourceFile]) -> list[list[Any]]:
    """Name, size and time of change of each file: what tells an interrupted run that its input is still the same."""
    return [[file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns] for file in files]


def clean_files(
    files: list[SourceFile],
    folder: TextFolder,
    report: CleaningReport,
    is_contaminated: Callable[[str], bool] | None,
    is_near_duplicate: Callable[[str], bool] | None,
) -> None:
    """Fills the folder with the cleaned documents of `files`, behind those that an interrupted run has kept; `report`
    is the one of that run."""
    seen: set[bytes] = set()
    for document in read_documents([SourceFile(path, path.name) for path in folder.files()], CleaningReport()):
        seen.add(text_digest(document.text))
        if is_near_duplicate is not None:
            is_near_duplicate(document.text)
    with progress(total_bytes(files), "clean", "B") as bar:

        def counted() -> Iterator[Document]:
            for document in read_documents(files, report):
                bar.update(document.raw_bytes)
                yield document

        documents = counted()
        known = dataclasses.replace(report, invalid_lines=list(report.invalid_lines))
        for _ in islice(documents, report.documents):
            pass
        # not a second time
        report.invalid_lines, report.without_text = known.invalid_lines, known.without_text
        for document in clean_documents(
            documents, report, seen=seen, is_contaminated=is_contaminated, is_near_duplicate=is_near_duplicate
        ):
            folder.add(document, lambda: dataclasses.asdict(report))


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("clean", __doc__)
    parser.add_argument("--input", nargs="+", required=True, help="txt, jsonl(.gz|.zst), parquet or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    add_strict(parser)
    parser.add_argument(
        "--near_duplicates",
        type=positive_float,
        metavar="SIMILARITY",
        help="also drop documents whose 5-word shingles are this similar to an earlier one's, by MinHash; usual: 0.8",
    )
    parser.add_argument(
        "--decontaminate", nargs="+", metavar="FILE", help="evaluation sets (txt, json, jsonl, tsv, csv, parquet)"
    )
    parser.add_argument(
        "--ngram", type=positive_int, default=13, help="consecutive words shared with one that drop it (default: 13)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other text in OUTPUT")
    args = parser.parse(argv)
    check_output(args.output)
    if args.near_duplicates is not None and args.near_duplicates > 1:
        raise DataError(f"--near_duplicates {args.near_duplicates}: a similarity is at most 1; usual: 0.8")

    from data_tools.overlap import Contamination, NearDuplicates, evaluation_texts
    from data_tools.text_folder import TextFolder

    files = input_files(args.input)
    refuse_input_in(args.output, files)
    held_out = evaluation_texts(args.decontaminate) if args.decontaminate else []
    recipe = {
        "command": "clean",
        "version": CLEANING_VERSION,
        "input": file_facts(files),
        "near_duplicates": args.near_duplicates,
        "ngram": args.ngram if held_out else None,
        "evaluation_texts": text_digest("\0".join(held_out)).hex() if held_out else None,
    }
    folder = TextFolder(args.output, recipe, args.overwrite)
    if folder.finished:
        print(f"{args.output}: already holds this text, nothing to do")
        return
    report = CleaningReport(**folder.state)
    report.strict = args.strict
    contamination = Contamination(held_out, args.ngram) if held_out else None
    near = None if args.near_duplicates is None else NearDuplicates(args.near_duplicates)
    clean_files(files, folder, report, contamination, near)
    manifest = folder.close({"report": dataclasses.asdict(report)})
    if contamination is not None and contamination.too_short:
        short = contamination.too_short
        print(
            f"{short} of {len(held_out)} evaluation texts have fewer than --ngram {args.ngram} words and find nothing"
        )
    for line in report.lines():
        print(line)
    print(f"{args.output}: {sum(part['documents'] for part in manifest['parts'])} documents")


if __name__ == "__main__":
    run(main, resumes=True)
