"""The end of making a corpus: what was counted while its tokens passed by, written as the tables and `index.json`."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neomoba_dist.data import index as layout
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import Tokenizer


class CorpusCounts:
    """Length of each document, in order, and how often each id occurs."""

    def __init__(self, vocab_size: int) -> None:
        self.lengths = array("q")
        self.unigrams = np.zeros(vocab_size, np.int64)

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Counts documents of integer ids [n]; many at a time, because each call costs a pass over the vocabulary.
        DataError if an id does not lie in the vocabulary."""
        if not documents:
            return
        self.lengths.extend(map(len, documents))
        ids = np.concatenate(documents)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.unigrams):
            raise DataError(f"ids from {ids.min()} to {ids.max()}, the tokenizer has {len(self.unigrams)}")
        self.unigrams += np.bincount(ids, minlength=len(self.unigrams))

    def known_and_unknown(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """How many ordinary tokens there are, and how many that stand for unknown text."""
        unk = tokenizer.special.unk
        known = int(np.delete(self.unigrams, tokenizer.reserved_ids()).sum())
        return known, 0 if unk is None else int(self.unigrams[unk])


def length_histogram(lengths: np.ndarray) -> list[list[int]]:
    """Pairs [upper length, documents]: lengths up to 128, 256, 512, ... tokens; ends with the longest."""
    bins = np.ceil(np.log2(np.maximum(lengths, 128))).astype(np.int64)
    return [[1 << int(b), int((bins == b).sum())] for b in range(7, int(bins.max()) + 1)]


def unigram_entropy(unigrams: np.ndarray, reserved: list[int]) -> float:
    """Nats per ordinary token of the counts `unigrams` int64 [vocab_size]."""
    counts = np.delete(unigrams, reserved).astype(np.float64)
    counts = counts[counts > 0]
    shares = counts / max(1.0, counts.sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0  # of a single kind of token 0, not -0


def write_index(
    folder: Path,
    counts: CorpusCounts,
    tokenizer: Tokenizer,
    dtype: str,
    shards: list[layout.ShardEntry],
    members: layout.MemberTable,
    recipe: str,
    unknown_text_share: float | None = None,
    loss_spans: layout.LossSpans | None = None,
) -> layout.CorpusIndex:
    """Writes `members.npz`, `documents.npz`, with `loss_spans` also `loss_spans.npz` and, last, `index.json` beside
    finished shards and the tokenizer's file."""
    lengths = np.array(counts.lengths, np.int64)
    documents = layout.DocumentTable.from_lengths(lengths)
    tables = {layout.MEMBERS_FILE: members.to_bytes(), layout.DOCUMENTS_FILE: documents.to_bytes()}
    if loss_spans is not None:
        tables[layout.LOSS_SPANS_FILE] = loss_spans.to_bytes()
    for name, payload in tables.items():
        layout.write_atomically(folder / name, payload)
    digests = {name: hashlib.sha256(payload).hexdigest() for name, payload in tables.items()}
    reserved = tokenizer.reserved_ids()
    known, unknown = counts.known_and_unknown(tokenizer)
    index = layout.CorpusIndex(
        dtype=dtype,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        unigram_entropy=unigram_entropy(counts.unigrams, reserved),
        length_histogram=length_histogram(lengths),
        subsets=[[least, len(which), int(lengths[which].sum())] for least, which in documents.subsets.items()],
        tokenizer=layout.TokenizerEntry(
            file=tokenizer.file_name,
            kind=tokenizer.kind,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            special=vars(tokenizer.special),
            reserved_ranges=layout.ranges(reserved),
        ),
        members_sha256=digests[layout.MEMBERS_FILE],
        documents_sha256=digests[layout.DOCUMENTS_FILE],
        recipe=recipe,
        shards=shards,
        unknown_tokens=unknown,
        unknown_share=unknown / max(1, unknown + known),
        unknown_text_share=unknown_text_share,
        loss_spans_sha256=digests.get(layout.LOSS_SPANS_FILE),
    )
    layout.write_atomically(folder / layout.INDEX_FILE, index.to_json().encode("utf-8"))
    return index
