"""Documents that repeat other text: word n-grams shared with evaluation sets, and near repetitions by MinHash.

Decontamination is that of GPT-3 (arXiv 2005.14165, appendix C): a document that shares n consecutive words with an
evaluation text is dropped. MinHash and its banded index are those of the library `rensa`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.cleaning import CleaningReport, clean_text, decode_utf8
from data_tools.sources import input_files, read_documents
from neomoba_dist.data.errors import DataError

_WORD = re.compile(r"\w+")
_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
# odd, so that it can be inverted modulo 2^64: no word of the n-gram is lost from the sum
_MULTIPLIER = 0x9E3779B97F4A7C15


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits."""
    return _WORD.findall(text.lower())


class Contamination:
    """Tests whether a text shares n consecutive words with one of the evaluation texts.

    Windows are compared by a rolling hash, all at once, and each hit word by word: no false alarm.
    """

    def __init__(self, texts: list[str], n: int) -> None:
        self.n = n
        found = [words(clean_text(text)) for text in texts]
        long_enough = [text for text in found if len(text) >= n]
        self.too_short = len(found) - len(long_enough)
        self._windows = {tuple(text[i : i + n]) for text in long_enough for i in range(len(text) - n + 1)}
        self._numbers: dict[str, int] = {}
        for text in long_enough:
            for word in text:
                self._numbers.setdefault(word, len(self._numbers) + 1)
        self._sorted = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(self._hashes, long_enough)]))

    def __call__(self, text: str) -> bool:
        """True if the cleaned `text` holds a window of the evaluation texts."""
        found = words(text)
        if len(found) < self.n or not len(self._sorted):
            return False
        hashes = self._hashes(found)
        places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        hits = np.flatnonzero(self._sorted[places] == hashes).tolist()
        return any(tuple(found[i : i + self.n]) in self._windows for i in hits)

    def _hashes(self, found: list[str]) -> np.ndarray:
        """uint64 [words - n + 1]: a polynomial, modulo 2^64, of the numbers of the words in each window."""
        numbers = np.array([self._numbers.get(word, 0) for word in found], np.uint64)
        count = len(found) - self.n + 1
        total = np.zeros(count, np.uint64)
        for i in range(self.n):
            total = total * np.uint64(_MULTIPLIER) + numbers[i : i + count]
        return total


def evaluation_texts(paths: list[str]) -> list[str]:
    """The texts of evaluation sets: of txt and parquet the documents, of json and jsonl every string at any depth, of
    tsv and csv every cell. DataError if a file is of another kind."""
    texts: list[str] = []
    for given in map(Path, paths):
        files = sorted(path for path in given.rglob("*") if path.is_file()) if given.is_dir() else [given]
        for path in files:
            if not path.is_file():
                raise DataError(f"--decontaminate {path}: no such file or folder")
            texts += _file_texts(path)
    if not texts:
        raise DataError("--decontaminate: no text in these files")
    return texts


def _file_texts(path: Path) -> list[str]:
    try:
        if path.suffix in (".tsv", ".csv"):
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                if path.suffix == ".tsv":
                    return [cell for line in file for cell in line.rstrip("\r\n").split("\t")]
                return [cell for row in csv.reader(file) for cell in row]
        if path.suffix in (".json", ".jsonl"):
            text = decode_utf8(path.read_bytes(), path.name, CleaningReport())
            records = [text] if path.suffix == ".json" else [line for line in text.split("\n") if line.strip()]
            return [string for record in records for string in _strings(json.loads(record))]
    except (ValueError, csv.Error) as error:
        raise DataError(f"--decontaminate {path}: cannot be read ({error})") from error
    if path.suffix not in (".txt", ".parquet"):
        raise DataError(f"--decontaminate {path}: give txt, json, jsonl, tsv, csv or parquet")
    return [document.text for document in read_documents(input_files([path]), CleaningReport())]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def bands_for(threshold: float) -> int:
    """Number of bands of the index that finds pairs of this similarity: (1 / bands) ^ (1 / rows) is the similarity that
    is met half the time, and is taken at or below the threshold."""
    fitting = [b for b in (2, 4, 8, 16, 32, 64, 128) if (1 / b) ** (b / _PERMUTATIONS) <= threshold]
    return fitting[0] if fitting else _PERMUTATIONS


class NearDuplicates:
    """Remembers texts; tells whether a text is at least as similar as `threshold` to one of them (estimated Jaccard
    similarity of their sets of 5 consecutive words; the error of the estimate is about 0.04)."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHash, RMinHashLSH

        self._minhash = RMinHash
        self.threshold = threshold
        self._index = RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=bands_for(threshold))
        self._kept: list[RMinHash] = []

    def __call__(self, text: str) -> bool:
        """True if `text` nearly repeats a remembered one; remembers it if not."""
        found = words(text)
        last = max(1, len(found) - _SHINGLE_WORDS + 1)
        sketch = self._minhash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update([" ".join(found[i : i + _SHINGLE_WORDS]) for i in range(last)])
        if any(self._kept[key].jaccard(sketch) >= self.threshold for key in self._index.query(sketch)):
            return True
        self._index.insert(len(self._kept), sketch)
        self._kept.append(sketch)
        return False
