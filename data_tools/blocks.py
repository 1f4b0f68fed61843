"""Tokenising block by block: the unit of parallel work and of restart.

A block is a run of documents of about a million characters; the input alone decides where it ends. Long documents are
cut into pieces at line ends, where the tokenizer then yields the same ids. The tokens of a block go to one part file,
named by a digest of the block's text and of the tokenizer and written atomically: a part that exists is complete, so a
second run tokenises only what is missing, and the number of workers cannot change a byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import numpy as np

from data_tools.cleaning import CLEANING_VERSION, Document, clean_text, text_digest
from data_tools.unknown import UnknownText
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import write_atomically
from neomoba_dist.data.shards import id_dtype
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer

BLOCK_CHARACTERS = 1 << 20
# longer documents are cut, so that one book keeps several workers busy
PIECE_CHARACTERS = 1 << 18
# blocks handed to the pool ahead of the one awaited, per worker: bounds the memory
_AHEAD = 3
# of the arrays in a part, and in its file's name: parts of another version are made again
_PART_VERSION = 2
_LINE_END = re.compile(r"(?<=\S)\n")


@dataclass(frozen=True)
class Piece:
    """A whole document, or a part of a long one, cleaned. `first`, `last`: it begins, ends its document."""

    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Block:
    """Consecutive pieces. `raw_bytes`: how far they take the input; `key`: digest of texts and tokenizer."""

    number: int
    pieces: list[Piece]
    raw_bytes: int
    key: str

    def part(self, folder: Path) -> Path:
        """The file of its tokens."""
        return folder / f"{self.number:08d}-{self.key[:24]}-{_PART_VERSION}.npz"


def read_parts(paths: Iterable[Path]) -> Iterator[list[tuple[np.ndarray, bytes]]]:
    """For each part file the documents that end in it: ids, u16 or u32 [n], and the digest of the text. No ids where
    cleaning left nothing. DataError if a part is missing."""
    ids: list[np.ndarray] = []
    digests: list[bytes] = []
    for path in paths:
        documents = []
        try:
            with np.load(path, allow_pickle=False) as part:
                part_ids, ends, last, part_digests = (part[name] for name in ("ids", "ends", "last", "digests"))
        except FileNotFoundError as error:
            raise DataError(f"{path}: missing; --output must lie where every worker can write it") from error
        start = 0
        for end, is_last, digest in zip(ends.tolist(), last.tolist(), part_digests, strict=True):
            ids.append(part_ids[start:end])
            digests.append(digest.tobytes())
            start = end
            if is_last:
                if len(ids) == 1:
                    documents.append((ids[0], digests[0]))
                else:
                    documents.append((np.concatenate(ids), hashlib.blake2b(b"".join(digests), digest_size=16).digest()))
                ids, digests = [], []
        yield documents


def pieces_of(document: str, cut: bool) -> Iterator[Piece]:
    """The document as pieces of about PIECE_CHARACTERS if it is longer than that and may be `cut`.

    A piece begins with a line end that follows a visible character. Cleaning comes first, so that the places depend on
    the cleaned text alone.
    """
    start, text = 0, clean_text(document) if len(document) > PIECE_CHARACTERS and cut else document
    while cut and len(text) - start > PIECE_CHARACTERS:
        border = _LINE_END.search(text, start + PIECE_CHARACTERS)
        if border is None:
            break
        yield Piece(text[start : border.start()], start == 0, False)
        start = border.start()
    yield Piece(text[start:], start == 0, True)


def divide(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Block]:
    """The blocks of a stream of documents."""
    number, characters, raw_bytes = 0, 0, 0
    pieces: list[Piece] = []
    cut = tokenizer.splits_at_line_ends
    for document in documents:
        raw_bytes += document.raw_bytes
        for piece in pieces_of(document.text, cut):
            pieces.append(piece)
            characters += len(piece.text)
            if characters >= BLOCK_CHARACTERS:
                yield Block(number, pieces, raw_bytes, _key(pieces, tokenizer.sha256))
                number, pieces, characters, raw_bytes = number + 1, [], 0, 0
    if pieces:
        yield Block(number, pieces, raw_bytes, _key(pieces, tokenizer.sha256))


def _key(pieces: list[Piece], tokenizer_sha256: str) -> str:
    digest = hashlib.sha256(f"{CLEANING_VERSION} {tokenizer_sha256}".encode("ascii"))
    for piece in pieces:
        payload = piece.text.encode("utf-8", errors="surrogatepass")
        digest.update((4 * len(payload) + 2 * piece.first + piece.last).to_bytes(9, "little") + payload)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _worker_tokenizer(path: Path, sha256: str) -> Tokenizer:
    """Loaded once in each worker process; the digest tells apart what stood at a path at different times."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path}: changed while the corpus was made; run the same command again")
    return tokenizer


def tokenize_block(pieces: list[Piece], tokenizer_path: Path, tokenizer_sha256: str, part: Path) -> None:
    """Cleans and tokenises a block's pieces, without truncation, and writes its part."""
    tokenizer = _worker_tokenizer(tokenizer_path, tokenizer_sha256)
    dtype = np.dtype(id_dtype(tokenizer.vocab_size))
    head, tail = (np.array(border, dtype) for border in tokenizer.document_borders)
    texts = [clean_text(piece.text) for piece in pieces]
    ids = []
    found_ids = tokenizer.encode_arrays(texts)
    for piece, text, found in zip(pieces, texts, found_ids, strict=True):
        if text.strip() or not (piece.first and piece.last):
            parts = [*[head] * piece.first, found, *[tail] * piece.last]
            ids.append(np.concatenate(parts, dtype=dtype, casting="unsafe"))
        else:
            ids.append(np.zeros(0, dtype))
    digests = b"".join(map(text_digest, texts))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate(ids),
        ends=np.cumsum([len(piece) for piece in ids]),
        last=np.array([piece.last for piece in pieces]),
        digests=np.frombuffer(digests, np.uint8).reshape(-1, 16),
        **vars(UnknownText.of(texts, found_ids, tokenizer)),
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


def worker_pool(workers: int) -> AbstractContextManager[Executor]:
    """Processes of this machine."""
    # spawn: forking after the tokenizer library has started its threads can hang
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)


def tokenize_blocks(
    blocks: Iterable[Block],
    tokenizer: Tokenizer,
    folder: Path,
    pool: Executor | None,
    workers: int,
    done: Callable[[Block], None],
) -> list[str]:
    """Makes the missing parts in `folder`; calls `done` for each block in order and returns their keys.

    `pool` has `workers` workers, which read the tokenizer from `folder`; None: this process does the work.
    """
    tokenizer_path = tokenizer.save(folder)
    keys: list[str] = []
    waiting: deque[tuple[Block, Future[None] | None]] = deque()

    def finish_first() -> None:
        block, future = waiting.popleft()
        if future is not None:
            future.result()
        keys.append(block.key)
        done(block)

    try:
        for block in blocks:
            future = None
            if not (part := block.part(folder)).is_file():
                task = (block.pieces, tokenizer_path, tokenizer.sha256, part)
                if pool is None:
                    tokenize_block(*task)
                else:
                    future = pool.submit(tokenize_block, *task)
            waiting.append((block, future))
            if pool is None or len(waiting) > workers * _AHEAD:
                finish_first()
        while waiting:
            finish_first()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed (out of memory?); the same command goes on from here") from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return keys
