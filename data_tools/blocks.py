"""Tokenising block by block: the unit of parallel work and of restart.

A block is a run of documents of about a million characters; the input alone decides where it ends. Its tokens go to
one part file, named by a digest of the block's text and of the tokenizer and written atomically: a part that exists
is complete, so a second run tokenises only what is missing, and the number of workers cannot change a byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import numpy as np

from data_tools.clean import CLEANING_VERSION, Document, clean_text, text_digest
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import write_atomically
from neomoba_dist.data.shards import id_dtype
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer

BLOCK_CHARACTERS = 1 << 20
# blocks handed to the pool ahead of the one awaited, per worker: bounds the memory
_AHEAD = 3


@dataclass(frozen=True)
class Block:
    """Consecutive documents. `raw_bytes`: how far they take the input; `key`: digest of texts and tokenizer."""

    number: int
    texts: list[str]
    raw_bytes: int
    key: str

    def part(self, folder: Path) -> Path:
        """The file of its tokens."""
        return folder / f"{self.number:08d}-{self.key[:24]}.npz"


@dataclass(frozen=True)
class Part:
    """Tokens of one block. ids [n], u16 or u32; lengths int64 [documents], 0 = empty; digests uint8 [documents, 16]."""

    ids: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray

    @classmethod
    def from_file(cls, path: Path) -> Part:
        """Reads a finished part."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["ids"], arrays["lengths"], arrays["digests"])

    def documents(self) -> Iterator[tuple[np.ndarray, bytes]]:
        """(ids, digest of the text) of each document; no ids where cleaning left nothing."""
        ends = np.cumsum(self.lengths)
        for end, length, digest in zip(ends.tolist(), self.lengths.tolist(), self.digests, strict=True):
            yield self.ids[end - length : end], digest.tobytes()


def divide(documents: Iterable[Document], tokenizer_sha256: str) -> Iterator[Block]:
    """The blocks of a stream of documents."""
    number, texts, characters, raw_bytes = 0, [], 0, 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        raw_bytes += document.raw_bytes
        if characters >= BLOCK_CHARACTERS:
            yield Block(number, texts, raw_bytes, _key(texts, tokenizer_sha256))
            number, texts, characters, raw_bytes = number + 1, [], 0, 0
    if texts:
        yield Block(number, texts, raw_bytes, _key(texts, tokenizer_sha256))


def _key(texts: list[str], tokenizer_sha256: str) -> str:
    digest = hashlib.sha256(f"{CLEANING_VERSION} {tokenizer_sha256}".encode("ascii"))
    for text in texts:
        payload = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(payload).to_bytes(8, "little") + payload)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _worker_tokenizer(path: Path, sha256: str) -> Tokenizer:
    """Loaded once in each worker process; the digest tells apart what stood at a path at different times."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path}: changed while the corpus was made; run the same command again")
    return tokenizer


def tokenize_block(texts: list[str], tokenizer_path: Path, tokenizer_sha256: str, part: Path) -> None:
    """Cleans and tokenises a block's texts, without truncation, and writes its part."""
    tokenizer = _worker_tokenizer(tokenizer_path, tokenizer_sha256)
    ids: list[np.ndarray] = []
    digests = bytearray()
    dtype = np.dtype(id_dtype(tokenizer.vocab_size))
    for text in map(clean_text, texts):
        # one text a call: a block shall use one core, the pool uses the others
        document = tokenizer.wrap_document(tokenizer.encode(text)) if text.strip() else []
        ids.append(np.array(document, dtype))
        digests += text_digest(text)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate(ids),
        lengths=np.array([len(document) for document in ids], np.int64),
        digests=np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16),
    )
    write_atomically(part, buffer.getvalue())


def _start_worker() -> None:
    """Ctrl-C is for the parent to handle; a parent that was killed takes its workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=leave_with_parent, daemon=True).start()


def tokenize_blocks(
    blocks: Iterable[Block], tokenizer: Tokenizer, folder: Path, workers: int, done: Callable[[Block], None]
) -> list[str]:
    """Makes the missing parts in `folder`; calls `done` for each block in order and returns their keys.

    The workers read the tokenizer from `folder`.
    """
    tokenizer_path = tokenizer.save(folder)
    keys: list[str] = []

    def finish(block: Block) -> None:
        keys.append(block.key)
        done(block)

    if workers == 1:
        for block in blocks:
            if not block.part(folder).is_file():
                tokenize_block(block.texts, tokenizer_path, tokenizer.sha256, block.part(folder))
            finish(block)
        return keys

    # spawn: forking after the tokenizer library has started its threads can hang
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[Block, Future[None] | None]] = deque()

    def finish_first() -> None:
        block, future = waiting.popleft()
        if future is not None:
            future.result()
        finish(block)

    try:
        for block in blocks:
            future = None
            if not (part := block.part(folder)).is_file():
                future = pool.submit(tokenize_block, block.texts, tokenizer_path, tokenizer.sha256, part)
            waiting.append((block, future))
            if len(waiting) > workers * _AHEAD:
                finish_first()
        while waiting:
            finish_first()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed (out of memory?); the same command goes on from here") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return keys
