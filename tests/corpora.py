"""Real text and small token corpora for tests: the standard library, and `../shared/data` where present."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from pathlib import Path

import data_tools.tokenize_corpus as command
from data_tools.sources import input_files
from data_tools.train_tokenizer import KINDS
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.span_corruption import SENTINEL_NAMES
from neomoba_dist.data.tokenizer import load_tokenizer

# Larger texts beside the clone, where there are any; no test needs them. `.ci/run` points this at nothing.
SHARED_DATA = Path(os.environ.get("NEOMOBA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
# sources that every Python 3.11+ has, from 1 kB to 120 kB
MODULES = ("typing", "argparse", "ast", "inspect", "textwrap", "string", "this", "bisect", "heapq", "keyword", "token")


def standard_library_texts() -> dict[str, str]:
    """Name -> text of some modules of the standard library (about 500 kB)."""
    return {f"{name}.py": (STANDARD_LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}


def write_texts(folder: Path) -> Path:
    """Writes the modules and all their top-level definitions as documents of a jsonl file: many short, a few long."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for name, text in standard_library_texts().items():
            for number, piece in enumerate([text, *text.split("\n\n\n")]):
                file.write(json.dumps({"id": f"{name}:{number}", "text": piece}) + "\n")
    return folder


def make_tokenizer(folder: Path, kind: str, vocab_size: int = 1200, sentinels: int = 0) -> Path:
    """Trains a tokenizer on the modules."""
    names = [SENTINEL_NAMES[0].format(number) for number in range(sentinels)]
    payload = KINDS[kind](list(standard_library_texts().values()), vocab_size, names)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("tokenizer.json" if payload.startswith(b"{") else "tokenizer.model")).write_bytes(payload)
    return folder


def make_corpus(folder: Path, kind: str = "byte_bpe", shard_bytes: int = 200_000, sentinels: int = 0) -> Corpus:
    """A corpus of several shards with many short and some long documents."""
    texts = write_texts(folder / "text")
    tokenizer = load_tokenizer(make_tokenizer(folder / "tokenizer", kind, sentinels=sentinels))
    command.tokenize_corpus(input_files([texts]), tokenizer, folder / "shards", 1, shard_bytes)
    return open_corpus(folder / "shards")


def folder_digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file in a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
