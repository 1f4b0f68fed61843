"""The loader and its peers: a flat memory-mapped file, and webdataset with one member per document.

All build the same batches with the same packing, masking and tensor code and differ in how tokens reach a row. The
flat file is read by the same plan in the same order; webdataset, a stream, packs windows of documents as they come.
"""

from __future__ import annotations

import itertools
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset

from data_tools.corpus_index import CorpusCounts, write_index
from neomoba_dist.config import DataConfig
from neomoba_dist.data.build import BatchBuilder
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.order import RowOrder
from neomoba_dist.data.pack import Packing, plan_rows
from neomoba_dist.data.rows import RowBlock, Source
from neomoba_dist.data.shards import ShardWriter
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.tokenizer import HuggingFaceTokenizer

SEED = 1
VOCAB = 30_522
WINDOW = 4096  # documents that the webdataset peer packs together
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Shape(NamedTuple):
    """Rows of `length` tokens, in micro-batches of `micro` rows, `accumulation` of them in an update."""

    length: int
    micro: int
    accumulation: int


def web_like_corpus(folder: Path, tokens: int) -> Corpus:
    """About `tokens` random ids in documents as long as those of the web: log-normal, median 445 tokens."""
    import tokenizers

    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))])}
    backend = tokenizers.BertWordPieceTokenizer(vocabulary)
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = HuggingFaceTokenizer(backend.to_str().encode("utf-8"))
    tokenizer.save(folder)
    rng = np.random.default_rng(SEED)
    counts, writer = CorpusCounts(VOCAB), ShardWriter(folder, "uint16", 64_000_000)
    written = 0
    while written < tokens:
        length = int(np.clip(rng.lognormal(6.1, 1.0), 8, 200_000))
        ids = rng.integers(len(SPECIAL), VOCAB, length)
        ids[0], ids[-1] = vocabulary["[CLS]"], vocabulary["[SEP]"]
        writer.add(ids)
        counts.add([ids])
        written += length
    shards, members = writer.close()
    write_index(folder, counts, tokenizer, "uint16", shards, members, "bench")
    return open_corpus(folder)


def settings(prefetch: int) -> DataConfig:
    """The data settings of the benchmark: 20 % of the tokens masked, 80/10/10."""
    return DataConfig(train="", cache=None, max_documents_per_row=512, prefetch=prefetch)


class Loader:
    """The project's stream over a freshly opened corpus: every member is checked when it is first touched."""

    def __init__(self, folder: Path, shape: Shape, prefetch: int = 0) -> None:
        layout = {"sequence_length": shape.length, "micro_batch_size": shape.micro, "accumulation": shape.accumulation}
        source = Source(open_corpus(folder))
        self.stream = UpdateStream([source], settings(prefetch), objective="mlm", seed=SEED, **layout)  # type: ignore[arg-type]
        self.rows = self.stream.rows_in_epoch
        self.updates = (batches for batches, _ in iter(self.stream))


class FlatFile:
    """One file of all ids, mapped: the plan and the order of the loader, no members, no checks, no sources."""

    def __init__(self, corpus: Corpus, folder: Path, shape: Shape, *, in_order: bool = False) -> None:
        """`in_order`: documents end to end, rows in the order of the file, one stretch of the file per micro-batch."""
        path = folder / "flat.bin"
        if not path.is_file():
            corpus.tokens_at(0, corpus.tokens).astype("<u2").tofile(path)
        self._ids = np.asarray(np.memmap(path, "<u2", "r"))
        method = "concat" if in_order else "best_fit"
        self._packing = Packing(length=shape.length, max_documents=512, method=method)
        lengths = corpus.document_lengths
        self._plan = plan_rows(np.cumsum(lengths) - lengths, lengths, self._packing)
        self._order = RowOrder(np.array([self._plan.rows]), SEED)
        self._shape, self._in_order, self._padding = shape, in_order, corpus.special.padding
        self._builder = BatchBuilder(corpus, settings(0), objective="mlm", length=shape.length, seed=SEED)
        self.rows = self._plan.rows
        self.updates = self._updates()

    def _updates(self) -> Iterator[list]:
        shape = self._shape
        size = shape.micro * shape.accumulation
        for first in itertools.count(step=size):
            places = np.arange(first, first + size)
            rows = places % self.rows if self._in_order else self._order.rows_at(places)
            yield self._builder.build_update(self._block(rows, places // self.rows * self.rows + rows), shape.micro)

    def _block(self, rows: np.ndarray, row_ids: np.ndarray) -> RowBlock:
        length = self._shape.length
        tokens_T = np.full(len(rows) * length, self._padding, np.uint16)
        row, place, start, size = self._plan.pieces(rows, self._packing)
        place += row * length
        if self._in_order and rows[-1] - rows[0] == len(rows) - 1:
            stretch = self._ids[start[0] : start[0] + len(tokens_T)]
            tokens_T[: len(stretch)] = stretch
        else:
            for s, n, p in zip(start.tolist(), size.tolist(), place.tolist(), strict=True):
                tokens_T[p : p + n] = self._ids[s : s + n]
        return RowBlock(tokens_T, row_ids, place, size, self._padding, {})


class WebDataset:
    """webdataset's own reader over a tar with one member of ids per document."""

    def __init__(self, corpus: Corpus, folder: Path, shape: Shape) -> None:
        path = folder / "documents.tar"
        if not path.is_file():
            _write_documents(corpus, path)
        self._path, self._shape, self._padding = path, shape, corpus.special.padding
        self._builder = BatchBuilder(corpus, settings(0), objective="mlm", length=shape.length, seed=SEED)
        self.rows = -(-corpus.tokens // shape.length)
        self.updates = self._updates()

    def _windows(self) -> Iterator[list[np.ndarray]]:
        """The documents in the order of the tar, again and again."""
        while True:
            samples = iter(webdataset.WebDataset(str(self._path), shardshuffle=False))
            while window := list(itertools.islice(samples, WINDOW)):
                yield [np.frombuffer(sample["u16"], "<u2") for sample in window]

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, piece_start, piece_length) of the rows of one window of documents after the other."""
        length = self._shape.length
        packing = Packing(length=length, max_documents=512)
        for window in self._windows():
            lengths = np.array([len(document) for document in window])
            ids, starts = np.concatenate(window), np.cumsum(lengths) - lengths
            plan = plan_rows(starts, lengths, packing)
            row, places, begins, sizes = plan.pieces(np.arange(plan.rows), packing)
            places += row * length
            tokens_T = np.full(plan.rows * length, self._padding, np.uint16)
            for s, n, p in zip(begins.tolist(), sizes.tolist(), places.tolist(), strict=True):
                tokens_T[p : p + n] = ids[s : s + n]
            yield tokens_T, places, sizes

    def _updates(self) -> Iterator[list]:
        shape, done = self._shape, 0
        size = shape.micro * shape.accumulation
        for tokens_T, places, sizes in self._blocks():
            rows = len(tokens_T) // shape.length
            block = RowBlock(tokens_T, np.arange(done, done + rows), places, sizes, self._padding, {})
            for first in range(0, rows - size + 1, size):  # a window's last rows are left out, in its favour
                yield self._builder.build_update(block.rows(first, first + size), shape.micro)
            done += rows


def _write_documents(corpus: Corpus, path: Path) -> None:
    start = 0
    with open(path, "wb") as file:
        for number, length in enumerate(corpus.document_lengths.tolist()):
            payload = corpus.tokens_at(start, length).astype("<u2").tobytes()
            header = tarfile.TarInfo(f"{number:09d}.u16")
            header.size = len(payload)
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512))
            start += length
        file.write(bytes(1024))


def first_batch_seconds(folder: Path, shape: Shape, cache: Path, share: float) -> float:
    """Wall time from nothing open to the first update of a run resumed at `share` of an epoch; plans are cached."""
    stream = _cached_stream(folder, shape, cache)
    state = stream.state_dict()
    state["rows"] = int(share * stream.rows_in_epoch)
    began = time.perf_counter()
    resumed = _cached_stream(folder, shape, cache)
    resumed.load_state_dict(state)
    batches, _ = next(iter(resumed))
    assert isinstance(batches[0].input_ids, torch.Tensor)
    return time.perf_counter() - began


def _cached_stream(folder: Path, shape: Shape, cache: Path) -> UpdateStream:
    options = DataConfig(train="", cache=str(cache), max_documents_per_row=512)
    layout = {"sequence_length": shape.length, "micro_batch_size": shape.micro, "accumulation": shape.accumulation}
    return UpdateStream([Source(open_corpus(folder))], options, objective="mlm", seed=SEED, **layout)  # type: ignore[arg-type]
