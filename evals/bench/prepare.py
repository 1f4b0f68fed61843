"""Speed of preparing a corpus against the tokenizer library alone.

The whole of data_tools.tokenize_corpus with one worker (read, clean, tokenise, deduplicate, write parts, shards and
index) against the library with all texts in memory: in one call, or in one for each text if that costs less. CPU time
of the process, the least of the repetitions, in turn; the ratio is what preparation keeps of the library's speed.
Without --tokenizer the four kinds of train_tokenizer are trained first on the same text; without --input the text is
that of the Python installation. The environment variable RAYON_NUM_THREADS=1 holds the library to one core too.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import positive_int, print_table, write_json

if TYPE_CHECKING:
    from data_tools.cleaning import Document
    from neomoba_dist.data.tokenizer import Tokenizer

_SHARD_BYTES = 128_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench prepare`."""
    parser.add_argument("--input", nargs="+", metavar="PATH", help="text, as for tokenize_corpus")
    parser.add_argument("--tokenizer", nargs="+", metavar="PATH", help="tokenizers, as for tokenize_corpus")
    parser.add_argument("--megabytes", type=positive_int, default=8, metavar="N", help="of text (default: 8)")
    parser.add_argument("--vocab-size", type=positive_int, default=30_522, metavar="N", help="default: 30522")
    parser.add_argument(
        "--repetitions", type=positive_int, default=3, metavar="N", help="the least counts (default: 3)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for prepare.json")


def sample(inputs: list[str] | None, megabytes: int) -> list[Document]:
    """Cleaned documents of about this many million bytes."""
    from data_tools.cleaning import CleaningReport
    from data_tools.sample_corpus import take_documents
    from data_tools.sources import input_files, standard_library_files

    files = input_files(inputs) if inputs else standard_library_files()
    return take_documents(files, megabytes * 1e6, CleaningReport())


def tokenizers(args: argparse.Namespace, documents: list[Document], folder: Path) -> dict[str, Tokenizer]:
    """Name -> tokenizer: those of --tokenizer, else one of each kind."""
    from data_tools.train_tokenizer import KINDS
    from neomoba_dist.data.tokenizer import load_tokenizer

    if args.tokenizer:
        return {path: load_tokenizer(path) for path in args.tokenizer}
    found = {}
    for kind, train in KINDS.items():
        payload = train([document.text for document in documents], args.vocab_size)
        path = folder / f"{kind}.{'json' if payload.startswith(b'{') else 'model'}"
        path.write_bytes(payload)
        found[kind] = load_tokenizer(path)
    return found


def measure(tokenizer: Tokenizer, documents: list[Document], folder: Path, repetitions: int) -> dict[str, Any]:
    """Tokens, CPU seconds of the library and of the whole preparation, and their ratio."""
    from data_tools.sources import SourceFile
    from data_tools.text_folder import TextFolder
    from data_tools.tokenize_corpus import tokenize_corpus

    written = TextFolder(folder / "text", {}, overwrite=True)
    for document in documents:
        written.add(document, dict)
    written.close({})
    files = [SourceFile(path, path.name) for path in written.files()]
    texts = [document.text for document in documents]
    corpus = folder / "corpus"

    def prepare() -> None:
        shutil.rmtree(corpus, ignore_errors=True)
        tokenize_corpus(files, tokenizer, corpus, 1, _SHARD_BYTES)

    work: dict[Callable[[], object], str] = {
        lambda: tokenizer.encode_batch(texts): "library",
        lambda: [tokenizer.encode(text) for text in texts]: "library",
        prepare: "prepare",
    }
    seconds: dict[str, list[float]] = {"library": [], "prepare": []}
    for _ in range(repetitions):
        for call, name in work.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    library, whole = min(seconds["library"]), min(seconds["prepare"])
    return {"tokens": tokens, "library_seconds": library, "prepare_seconds": whole, "ratio": library / whole}


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    documents = sample(args.input, args.megabytes)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in tokenizers(args, documents, Path(folder)).items():
            rows[name] = measure(tokenizer, documents, Path(folder), args.repetitions)
    header = ("tokenizer", "M tokens", "library Mtok/CPU-s", "prepare Mtok/CPU-s", "ratio")
    print_table([header, *((Path(name).name, *_cells(row)) for name, row in rows.items())])
    print(processor_name(), file=sys.stderr)  # the table alone is the output
    if args.output is not None:
        command = shlex.join(["python", "-m", "evals", "bench", "prepare", *sys.argv[3:]])
        result = {"command": command, "machine": processor_name(), "rows": rows}
        write_json(args.output, "prepare", result)
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rates = (row["tokens"] / row[name] / 1e6 for name in ("library_seconds", "prepare_seconds"))
    return f"{row['tokens'] / 1e6:.2f}", *(f"{rate:.2f}" for rate in rates), f"{row['ratio']:.3f}"
