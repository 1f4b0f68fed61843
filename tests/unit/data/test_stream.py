"""The stream: update k is the same for every layout and after every resume; batches describe their documents."""

from __future__ import annotations

import json
import shutil
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import DataConfig
from neomoba_dist.data.batch import LEAST_DOCUMENTS, PADDING_POSITION, Batch
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import CorpusIndex
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.validation import validation_batches
from tests.corpora import make_corpus

LENGTH = 512


def _settings(**changes: Any) -> DataConfig:
    return DataConfig(**{"train": "", "max_documents_per_row": 16, "cache": None, "prefetch": 0, **changes})


def _stream(corpus: Corpus, settings: DataConfig | None = None, **changes: Any) -> UpdateStream:
    layout: dict[str, Any] = {
        "objective": "mlm",
        "sequence_length": LENGTH,
        "micro_batch_size": 2,
        "accumulation": 4,
        "seed": 1,
    }
    return UpdateStream([Source(corpus)], settings or _settings(), **layout | changes)


def _rows(batches: list[Batch]) -> dict[int, tuple[bytes, ...]]:
    """Row id -> the bytes of its tensors."""
    rows = {}
    for batch in batches:
        tensors = [t.reshape(batch.rows, -1) for t in (batch.input_ids, batch.labels, batch.position_ids)]
        for i, row_id in enumerate(batch.row_ids.tolist()):
            rows[row_id] = tuple(t[i].numpy().tobytes() for t in tensors)
    return rows


def _equal(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(value, getattr(second, name)) if isinstance(value, torch.Tensor) else value == getattr(second, name)
        for name, value in vars(first).items()
    )


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_updates_do_not_depend_on_the_layout(corpus: Corpus, objective: str) -> None:
    updates = _stream(corpus, objective=objective).rows_in_epoch // 8 + 2  # over the end of the epoch
    reference = [_rows(batches) for batches, _ in islice(_stream(corpus, objective=objective), updates)]
    counts = [b[0].num_valid for b, _ in islice(_stream(corpus, objective=objective), updates)]
    for dp_size, accumulation, micro in ((2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 8, 1), (2, 1, 4)):
        ranks = [
            islice(
                _stream(
                    corpus,
                    objective=objective,
                    dp_rank=rank,
                    dp_size=dp_size,
                    accumulation=accumulation,
                    micro_batch_size=micro,
                ),
                updates,
            )
            for rank in range(dp_size)
        ]
        for expected, count, *shares in zip(reference, counts, *ranks, strict=True):
            assert len({json.dumps(state) for _, state in shares}) == 1
            batches = [batch for share, _ in shares for batch in share]
            assert len(batches) * micro == 8
            assert _rows(batches) == expected
            assert sum(share[0].num_valid for share, _ in shares) == count


def test_an_epoch_holds_every_row_once_and_the_next_is_ordered_anew(corpus: Corpus) -> None:
    stream = _stream(corpus, micro_batch_size=1, accumulation=1)
    rows = stream.rows_in_epoch
    ids = [int(batches[0].row_ids[0]) for batches, _ in islice(stream, 2 * rows)]
    assert sorted(ids) == list(range(2 * rows))
    assert [i - rows for i in ids[rows:]] != ids[:rows] != sorted(ids[:rows])
    other = [int(b[0].row_ids[0]) for b, _ in islice(_stream(corpus, micro_batch_size=1, accumulation=1, seed=2), rows)]
    assert other != ids[:rows]


def test_masks_differ_between_epochs(corpus: Corpus) -> None:
    stream = _stream(corpus, micro_batch_size=1, accumulation=1)
    rows = stream.rows_in_epoch
    batches = {int(b[0].row_ids[0]): b[0] for b, _ in islice(stream, 2 * rows)}
    assert not torch.equal(batches[0].labels, batches[rows].labels)


def test_resume_equals_the_uninterrupted_run(corpus: Corpus) -> None:
    whole = list(islice(_stream(corpus), 8))
    for done in (1, 5):
        state = json.loads(json.dumps(whole[done - 1][1]))
        assert len(json.dumps(state)) < 1000
        assert state["rows"] == 8 * done
        resumed = _stream(corpus)
        resumed.load_state_dict(state)
        for (batches, after), (expected, expected_after) in zip(islice(resumed, 8 - done), whole[done:], strict=True):
            assert after == expected_after
            assert all(_equal(a, b) for a, b in zip(batches, expected, strict=True))


def test_elastic_resume_in_mid_epoch(corpus: Corpus) -> None:
    """dp 2 -> 4 -> 1, and a larger update on the way: the rows go on where they stopped."""
    taken: list[int] = []
    state = None
    for dp_size, accumulation in ((2, 2), (4, 1), (1, 6)):
        streams = [_stream(corpus, dp_rank=r, dp_size=dp_size, accumulation=accumulation) for r in range(dp_size)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for shares in zip(*(islice(stream, 2) for stream in streams), strict=True):
            taken += sorted(i for share, _ in shares for batch in share for i in batch.row_ids.tolist())
            state = shares[0][1]
    sizes = [8, 8, 8, 8, 12, 12]
    one = _stream(corpus, micro_batch_size=1, accumulation=1)
    ids = [int(b[0].row_ids[0]) for b, _ in islice(one, sum(sizes))]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert taken == [i for size, end in zip(sizes, ends, strict=True) for i in sorted(ids[end - size : end])]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_batches_describe_their_documents(corpus: Corpus, objective: str) -> None:
    pad, cls, sep = (int(corpus.index.tokenizer.special[role] or 0) for role in ("pad", "cls", "sep"))
    reserved = torch.tensor(sorted(corpus.index.tokenizer.reserved_ids()))
    starts = 0
    for batches, _ in islice(_stream(corpus, objective=objective), 6):
        assert batches[0].num_valid == sum(batch.local_valid() for batch in batches)
        for batch in batches:
            total = 2 * LENGTH
            assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (total,)
            assert batch.cu_seqlens.shape == (2 * 17 + 1,)
            assert batch.cu_seqlens.dtype == torch.int32
            borders = batch.cu_seqlens.tolist()
            assert borders[0] == 0
            assert borders[-1] == total
            assert borders == sorted(borders)
            assert LENGTH in borders
            for start, stop in pairwise(borders):
                original = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)[start:stop]
                padded = stop > start and bool((original == pad).all())
                expected_positions = [-1] * (stop - start) if padded else list(range(stop - start))
                assert batch.position_ids[start:stop].tolist() == expected_positions
                if objective == "clm" and stop > start:
                    assert batch.labels[stop - 1] == -100
                    expected = torch.full((stop - start - 1,), -100) if padded else batch.input_ids[start + 1 : stop]
                    assert torch.equal(batch.labels[start : stop - 1], expected)
                elif objective == "mlm" and stop > start:
                    # [CLS] begins documents, [SEP] ends them, nothing of either stands inside
                    assert not (original[1:] == cls).any()
                    assert not (original[:-1] == sep).any()
                    starts += int(original[0] == cls)
            if objective == "mlm":
                assert not torch.isin(batch.labels, reserved).any()
    assert objective == "clm" or starts > 10


def test_padding_is_small_and_counted(corpus: Corpus) -> None:
    stream = _stream(corpus, objective="clm", micro_batch_size=1, accumulation=1)
    batches = [b[0] for b, _ in islice(stream, stream.rows_in_epoch)]
    pads = sum(int((batch.input_ids == corpus.special.padding).sum()) for batch in batches)
    assert sum(batch.input_ids.numel() for batch in batches) - pads == corpus.tokens
    assert sum(int((batch.position_ids == PADDING_POSITION).sum()) for batch in batches) == pads > 0
    assert stream.padding_share == pytest.approx(pads / (stream.rows_in_epoch * LENGTH))
    assert stream.padding_share < 0.02


def test_validation_rows_are_fixed_and_complete(corpus: Corpus) -> None:
    settings: dict[str, Any] = {"objective": "mlm", "sequence_length": LENGTH, "rows": 10}
    reference = validation_batches(corpus, _settings(), micro_batch_size=1, **settings)
    assert len(reference) == 10
    counted = sum(batch.num_valid for batch in reference)
    for dp_size, micro in ((1, 4), (2, 2), (4, 2), (4, 3)):
        ranks = [
            validation_batches(corpus, _settings(), micro_batch_size=micro, dp_rank=rank, dp_size=dp_size, **settings)
            for rank in range(dp_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for rank in ranks for batch in rank]
        assert all(batch.rows == micro for batch in batches)
        assert sum(batch.num_valid for batch in batches) == sum(batch.local_valid() for batch in batches) == counted
        labelled = {row: data for row, data in _rows(batches).items() if row in _rows(reference)}
        assert set(labelled) == set(_rows(reference))
    everything = validation_batches(corpus, _settings(), micro_batch_size=1, **settings | {"rows": 10**6})
    assert len(everything) == _stream(corpus).rows_in_epoch


def test_refused_before_training(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fewer than the 4000 of one update.*tokens_per_update"):
        _stream(corpus, accumulation=2000)
    with pytest.raises(DataError, match=rf"set neomoba.model.vocab_size={corpus.vocab_size}"):
        corpus.require_vocabulary(corpus.vocab_size - 1)
    corpus.require_vocabulary(corpus.vocab_size)
    with pytest.raises(DataError, match="choose one of mlm, clm, span_corruption"):
        _stream(corpus, objective="masked")
    state = _stream(corpus).state_dict()
    with pytest.raises(DataError, match="is not the data of the checkpoint"):
        _stream(corpus).load_state_dict({**state, "fingerprint": "0" * 32})
    with pytest.raises(DataError, match=r"neomoba\.phase\.sequence_length is 256"):
        _stream(corpus, sequence_length=256).load_state_dict(state)
    other = shutil.copytree(corpus.folder, tmp_path / "copy")
    assert open_corpus(other).fingerprint == corpus.fingerprint


def test_clm_corpus_without_mask_token(tmp_path: Path) -> None:
    """A GPT-2 kind of tokenizer trains a decoder and is refused for MLM."""
    corpus = make_corpus(tmp_path)
    index = corpus.index
    index.tokenizer.special["mask"] = None
    (corpus.folder / "index.json").write_text(CorpusIndex(**vars(index)).to_json(), encoding="utf-8")
    corpus = open_corpus(corpus.folder)
    with pytest.raises(DataError, match="no mask token"):
        _stream(corpus)
    assert next(iter(_stream(corpus, objective="clm")))[0][0].num_valid > 0


@pytest.mark.parametrize("documents", [1, LEAST_DOCUMENTS, LEAST_DOCUMENTS + 1, 40, 64, 99, 100])
def test_trimmed_borders_are_few_and_complete(documents: int) -> None:
    ids = torch.zeros(100, dtype=torch.int64)
    borders = torch.tensor([*range(documents), *[100] * 60], dtype=torch.int32)
    batch = Batch(input_ids=ids, labels=ids, position_ids=ids, cu_seqlens=borders, row_ids=ids[:1], num_valid=1)
    kept = batch.trimmed().cu_seqlens
    assert kept.unique().tolist() == borders.unique().tolist()
    room = len(kept) - 1
    assert room in (16, 32, 64, 128) or room == len(borders) - 1  # few shapes; never more than there were
    assert room < max(2 * documents, LEAST_DOCUMENTS + 1)
    assert torch.equal(batch.cu_seqlens, borders)
