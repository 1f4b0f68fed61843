"""bench loader: runs, and its peers read the same tokens as the loader."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from evals.__main__ import main
from evals.bench import _loader_peers as peers
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.corpus import Corpus

SHAPE = peers.Shape(512, 4, 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return peers.web_like_corpus(tmp_path_factory.mktemp("corpus"), 100_000)


def test_the_flat_file_gives_the_batches_of_the_loader(corpus: Corpus, tmp_path: Path) -> None:
    loader, flat = peers.Loader(corpus.folder, SHAPE), peers.FlatFile(corpus, tmp_path, SHAPE)
    assert loader.rows == flat.rows > 100
    for ours, theirs in islice(zip(loader.updates, flat.updates, strict=False), flat.rows // 8):
        for a, b in zip(ours, theirs, strict=True):
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "row_ids"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name


def _originals(batches: list[Batch]) -> list[int]:
    """Counts of all ids before masking, padding left out."""
    ids = [torch.where(b.labels >= 0, b.labels, b.input_ids)[b.position_ids >= 0] for b in batches]
    return torch.bincount(torch.cat(ids), minlength=peers.VOCAB).tolist()


def test_webdataset_and_the_file_in_order_give_every_token(corpus: Corpus, tmp_path: Path) -> None:
    expected = torch.bincount(torch.from_numpy(corpus.tokens_at(0, corpus.tokens)), minlength=peers.VOCAB).tolist()
    shape = peers.Shape(512, 1, 1)  # nothing is left out at a window's end
    peer = peers.WebDataset(corpus, tmp_path, shape)
    taken: list[Batch] = []
    while sum(int((b.position_ids >= 0).sum()) for b in taken) < corpus.tokens:
        taken += next(peer.updates)
    assert _originals(taken) == expected
    in_order = peers.FlatFile(corpus, tmp_path, shape, in_order=True)
    assert _originals([b for update in islice(in_order.updates, in_order.rows) for b in update]) == expected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "60000", "--lengths", "256,1024", "--micro-batch-tokens", "2048", "--repetitions", "1"]
    assert main(["bench", "loader", *words, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("M tokens / CPU s")
    assert [line.split()[0] for line in table[1:]] == ["256", "1024"]
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert all(rate > 0 for row in rows for rate in row["rates"].values())
    assert all(row["resume_seconds"] < 1 for row in rows)
    assert (tmp_path / "loader.png").stat().st_size > 10_000
