"""Damaged corpora: eight kinds of damage, each found before or at the row that it touches; skipping, by agreement."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import IGNORE_LABEL, PADDING_POSITION, Batch
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import MEMBERS_FILE, MemberTable
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream

LENGTH = 256
HIT = "shard-00001.tar"


def _stream(corpus: Corpus, *, on_corrupt: str = "raise", prefetch: int = 0, **layout: object) -> UpdateStream:
    settings = DataConfig(train="", cache=None, prefetch=prefetch, on_corrupt=on_corrupt)  # type: ignore[arg-type]
    shape: dict = {"objective": "mlm", "sequence_length": LENGTH, "micro_batch_size": 2, "accumulation": 2, "seed": 1}
    return UpdateStream([Source(corpus)], settings, **shape | layout)


def _epoch(stream: UpdateStream) -> list[list[Batch]]:
    return [batches for batches, _ in islice(stream, -(-stream.rows_in_epoch // stream.rows_per_update))]


def _members(folder: Path) -> MemberTable:
    return MemberTable.from_file(folder / MEMBERS_FILE, open_corpus(folder).index.members_sha256)


def _flip(path: Path, offset: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[offset] ^= 0x10
    path.write_bytes(payload)


def _cut_at_member(folder: Path) -> None:
    members = _members(folder)
    last = int(np.flatnonzero(members.shard == 1)[-1])
    _cut(folder, int(members.tokens_offset[last]) - 512)


def _cut(folder: Path, size: int) -> None:
    payload = (folder / HIT).read_bytes()
    assert 0 < size < len(payload)
    (folder / HIT).write_bytes(payload[:size])


def _flip_member(folder: Path, distance: int) -> None:
    members = _members(folder)
    _flip(folder / HIT, int(members.tokens_offset[np.flatnonzero(members.shard == 1)[-1]]) + distance)


def _swap(folder: Path) -> None:
    """Two shards of the same size: the sizes in the index say nothing."""
    first, second = (folder / name for name in ("shard-00000.tar", HIT))
    size = max(first.stat().st_size, second.stat().st_size)
    payloads = [path.read_bytes().ljust(size, b"\0") for path in (first, second)]
    first.write_bytes(payloads[1][: first.stat().st_size])
    second.write_bytes(payloads[0][: second.stat().st_size])


STRUCTURAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut between members": (_cut_at_member, rf"{HIT}: \d+ bytes, the index says \d+ \(differs from offset \d+ on\)"),
    "cut in a header": (lambda folder: _cut(folder, 300), rf"{HIT}: 300 bytes, .* from offset 300"),
    "cut in a payload": (lambda folder: _cut(folder, 5000), rf"{HIT}: 5000 bytes, .* from offset 5000"),
    "missing": (lambda folder: (folder / HIT).unlink(), f"{HIT}: shard is missing"),
    "swapped": (_swap, r"shard-0000[01].tar: lengths at byte offset \d+ .* fail their crc32"),
    "extra": (lambda folder: shutil.copy(folder / HIT, folder / "shard-7.tar") and None, "shard-7.tar: extra shard"),
}
CONTENT: dict[str, tuple[int, str]] = {
    "header flip": (-512 + 3, rf"{HIT}: tar header at byte offset \d+ is damaged"),
    "payload flip": (1001, rf"{HIT}: tokens at byte offset \d+ \(\d+ bytes\) fail their crc32"),
}


@pytest.mark.parametrize("damage", STRUCTURAL)
def test_structural_damage_is_found_before_the_first_step(copy: Path, damage: str) -> None:
    act, message = STRUCTURAL[damage]
    act(copy)
    with pytest.raises(DataError, match=message):
        open_corpus(copy)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("damage", CONTENT)
def test_damage_of_content_is_found_when_it_is_read(copy: Path, damage: str, prefetch: int) -> None:
    distance, message = CONTENT[damage]
    _flip_member(copy, distance)
    stream = _stream(open_corpus(copy), prefetch=prefetch)
    with pytest.raises(DataError, match=message):
        _epoch(stream)
    assert stream.rows_consumed < stream.rows_in_epoch


def test_skipped_rows_count_and_the_others_stay(copy: Path, corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    _flip_member(copy, 1001)
    damaged = open_corpus(copy)
    stream = _stream(damaged, on_corrupt="skip")
    skipped = 0
    with caplog.at_level(logging.WARNING):
        for expected, (batches, _) in zip(_epoch(_stream(corpus)), stream, strict=False):
            in_update = 0
            for batch, intact in zip(batches, expected, strict=True):
                for i in range(batch.rows):
                    row = slice(i * LENGTH, (i + 1) * LENGTH)
                    if torch.equal(batch.input_ids[row], intact.input_ids[row]):
                        assert torch.equal(batch.labels[row], intact.labels[row])
                        continue
                    in_update += 1
                    assert (batch.labels[row] == IGNORE_LABEL).all()
                    assert (batch.position_ids[row] == PADDING_POSITION).all()
                    assert (batch.input_ids[row] == corpus.special.padding).all()
                assert batch.cu_seqlens.shape == intact.cu_seqlens.shape
            assert batches[0].num_valid == sum(batch.local_valid() for batch in batches)
            assert stream.skipped_rows == in_update
            skipped += in_update
    member = int(np.flatnonzero(_members(copy).shard == 1)[-1])
    tokens = int(_members(copy).tokens_size[member]) // 2
    assert tokens // LENGTH <= skipped <= tokens // 10
    assert skipped == sum("row skipped" in text and HIT in text for text in caplog.messages)


def test_ranks_agree_on_what_they_skip(copy: Path, corpus: Corpus) -> None:
    """Two tensor-parallel ranks, of which one reads from a damaged disk: both skip the same rows."""
    _flip_member(copy, 1001)
    found: list[np.ndarray] = []

    def agree(rows: np.ndarray) -> np.ndarray:
        found.append(rows)
        return found[-2] | found[-1] if len(found) % 2 == 0 else rows

    layout = {"dp_rank": 1, "dp_size": 2, "accumulation": 1}
    bad = _stream(open_corpus(copy), on_corrupt="skip", agree=agree, **layout)
    good = _stream(corpus, on_corrupt="skip", agree=agree, **layout)
    total = 0
    for (batches, _), (others, _) in zip(islice(bad, 40), good, strict=False):
        assert bad.skipped_rows == good.skipped_rows
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, others, strict=True))
        total += good.skipped_rows
    assert total > 0


def test_ids_that_the_vocabulary_does_not_have_are_found_when_read(corpus: Corpus) -> None:
    reader = open_corpus(corpus.folder).reader
    reader._vocab_size = 300
    problems = reader.read(np.array([0]), np.array([10]), np.zeros(10, reader.dtype), np.array([0]))
    assert "but the vocabulary has 300" in problems[0]
    assert "shard-00000.tar: ids from" in problems[0]
