"""Loss by position against a computation of its own, and its statistics."""

import argparse
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals import position_loss
from evals.load import Subject
from evals.position_loss import Estimate, bucket_edges
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.masking import MaskedLanguageModel
from neomoba_dist.data.pack import Packing
from neomoba_dist.data.rows import Rows, Source
from neomoba_dist.model.attention.layer import set_full_attention

LENGTH, BORDER, BUCKETS, ROWS = 512, 300, 8, 16


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"length": None, "rows": 10_000, "buckets": 16, "border": None, **changes})


def direct_losses(subject: Subject, rows: list[int], attention: str) -> tuple[np.ndarray, np.ndarray]:
    """(losses, counted) [R, L] of rows of the packed corpus: one row at a time, full logits, plain softmax."""
    set_full_attention(subject.model, attention == "full")
    masks = MaskedLanguageModel(0, 0.2, "80/10/10", subject.corpus.special.mask, subject.corpus.ordinary)
    source = Rows([Source(subject.corpus)], Packing(length=LENGTH, max_documents=32), seed=0)
    losses, counted = [], []
    for row in rows:
        block = source.read(np.array([row]))
        tokens = block.tokens_T.astype(np.int64)
        assert block.piece_length.tolist() == [LENGTH]
        if subject.config.model.objective == "mlm":
            inputs, labels = tokens.copy(), np.full(LENGTH, -100)
            masks.apply(block, inputs, labels)
        else:
            inputs, labels = tokens, np.append(tokens[1:], -100)
        batch = Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            position_ids=torch.arange(LENGTH),
            cu_seqlens=torch.tensor([0, LENGTH], dtype=torch.int32),
            row_ids=torch.tensor([row]),
            num_valid=1,
        )
        with torch.inference_mode():
            logits = subject.model.logits(subject.model.hidden_states(batch)).double()
        losses.append(F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=-100).numpy())
        counted.append(labels != -100)
    return np.stack(losses), np.stack(counted)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_equals_direct_computation(subjects: dict[str, Subject], objective: str) -> None:
    subject = subjects[objective]
    plan = position_loss.prepare(subject, options(length=LENGTH, border=BORDER, buckets=BUCKETS, rows=ROWS))
    result = position_loss.run(subject, plan)
    assert list(result["curves"]) == ["moba", "full"]
    for attention, curve in result["curves"].items():
        losses, counted = direct_losses(subject, plan.rows, attention)
        assert result["rows"] == len(losses) == ROWS
        assert [(bucket["start"], bucket["end"]) for bucket in curve["buckets"]] == [
            (start, start + 64) for start in range(0, LENGTH, 64)
        ]
        for bucket in curve["buckets"]:
            part = slice(bucket["start"], bucket["end"])
            assert bucket["tokens"] == counted[:, part].sum()
            assert bucket["loss"] == pytest.approx(losses[:, part][counted[:, part]].mean(), rel=1e-6)
        within, beyond = losses[:, :BORDER][counted[:, :BORDER]], losses[:, BORDER:][counted[:, BORDER:]]
        assert curve["within"]["loss"] == pytest.approx(within.mean(), rel=1e-6)
        assert curve["beyond"]["loss"] == pytest.approx(beyond.mean(), rel=1e-6)
        assert curve["beyond_minus_within"]["loss"] == pytest.approx(beyond.mean() - within.mean(), abs=1e-5)
        assert curve["within"]["tokens"] + curve["beyond"]["tokens"] == curve["all"]["tokens"] == counted.sum()
        mean = losses[counted].mean()
        assert result["summary"][attention] == {
            "mean": pytest.approx(mean, rel=1e-6),
            "within": curve["within"]["loss"],
            "beyond": curve["beyond"]["loss"],
        }
    moba, full = result["summary"]["moba"]["mean"], result["summary"]["full"]["mean"]
    assert abs(moba - full) > 1e-4  # sparse is not full
    assert result["moba_minus_full"]["loss"] == pytest.approx(moba - full)


def test_rows_are_filled_by_one_document(subjects: dict[str, Subject]) -> None:
    subject = subjects["clm"]
    plan = position_loss.prepare(subject, options(rows=12))
    assert plan.length == subject.config.phase.sequence_length
    assert plan.border is None
    assert len(set(plan.rows)) == 12
    batch = plan.builder.build(plan.source.read(np.array(plan.rows)))
    assert torch.equal(batch.position_ids, torch.arange(plan.length).repeat(12))
    assert position_loss.prepare(subject, options(rows=5)).rows == plan.rows[:5]
    source = plan.source
    full = [row for row in range(source.total) if source.read(np.array([row])).piece_length.tolist() == [plan.length]]
    assert sorted(position_loss.prepare(subject, options()).rows) == full


def test_border_is_the_trained_length_where_rows_are_longer(subjects: dict[str, Subject]) -> None:
    assert position_loss.prepare(subjects["mlm"], options(length=LENGTH, rows=1)).border == 96


def test_a_position_without_counted_tokens_is_null(subjects: dict[str, Subject]) -> None:
    # one row of MLM: in buckets of two tokens some have no mask
    plan = position_loss.prepare(subjects["mlm"], options(rows=1, buckets=48))
    curve = position_loss.run(subjects["mlm"], plan)["curves"]["moba"]
    empty = [bucket for bucket in curve["buckets"] if "tokens" not in bucket]
    assert empty
    assert all(bucket["loss"] is None and bucket["standard_error"] is None for bucket in empty)
    assert curve["all"]["standard_error"] is None  # one row does not show its error


@pytest.mark.parametrize(
    ("buckets", "length", "edges"),
    [
        (4, 96, [0, 24, 48, 72, 96]),
        (16, 4, [0, 1, 2, 3, 4]),
        ("log2", 96, [0, 16, 32, 64, 96]),
        ("log2", 128, [0, 16, 32, 64, 128]),
        ("log2", 12, [0, 12]),
    ],
)
def test_bucket_edges(buckets: int | str, length: int, edges: list[int]) -> None:
    assert bucket_edges(buckets, length).tolist() == edges


def test_standard_error_is_that_of_the_mean_of_rows() -> None:
    generator = np.random.default_rng(0)
    sums = generator.normal(50.0, 5.0, 400)
    estimate = Estimate.of(sums, np.full(400, 10)).to_dict()
    assert estimate["loss"] == pytest.approx(sums.mean() / 10)
    assert estimate["standard_error"] == pytest.approx(sums.std(ddof=1) / 10 / 400**0.5)
    assert estimate["tokens"] == 4000


def test_standard_error_with_uneven_rows_is_the_spread_of_repetitions() -> None:
    generator = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(600):
        counts = generator.integers(1, 60, 80)
        sums = counts * generator.normal(5.0, 1.0, 80)  # tokens of a row share its level
        estimate = Estimate.of(sums, counts).to_dict()
        means.append(estimate["loss"])
        errors.append(estimate["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_difference_knows_that_the_rows_are_the_same() -> None:
    level = np.random.default_rng(2).normal(5.0, 1.0, 50)
    counts = np.full(50, 20)
    high, low = Estimate.of((level + 0.3) * counts, counts), Estimate.of(level * counts, counts)
    difference = high.minus(low).to_dict()
    assert difference["loss"] == pytest.approx(0.3)
    assert difference["standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert high.to_dict()["standard_error"] > 0.1
