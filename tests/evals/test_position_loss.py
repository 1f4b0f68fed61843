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
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.masking import MaskedLanguageModel
from neomoba_dist.data.pack import Packing
from neomoba_dist.data.rows import Rows, Source
from neomoba_dist.data.validation import VALIDATION_SEED
from neomoba_dist.model.attention.layer import set_full_attention

LENGTH, BORDER, BUCKETS, ROWS = 512, 300, 8, 16


def options(**changes: Any) -> argparse.Namespace:
    given = {"length": None, "rows": 10_000, "buckets": 16, "border": None, "rule": "rows", "mask_stride": 8}
    return argparse.Namespace(**{**given, "trailing": None, "limit": None, **changes})


def direct_losses(subject: Subject, rows: list[int], attention: str) -> tuple[np.ndarray, np.ndarray]:
    """(losses, counted) [R, L] of rows of the packed corpus: one row at a time, full logits, plain softmax."""
    model, _ = load_model(subject.checkpoint)
    set_full_attention(model, attention == "full")
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
            logits = model.logits(model.hidden_states(batch)).double()
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
    (own, counted), (other, _) = (direct_losses(subject, plan.rows, name) for name in ("moba", "full"))
    for bucket in result["difference"]:
        part = slice(bucket["start"], bucket["end"])
        gaps, counts = np.where(counted, own - other, 0)[:, part].sum(1), counted[:, part].sum(1)
        gap = gaps.sum() / counts.sum()
        assert bucket["loss"] == pytest.approx(gap, abs=2e-6)
        error = (ROWS / (ROWS - 1) * ((gaps - gap * counts) ** 2).sum()) ** 0.5 / counts.sum()
        assert bucket["standard_error"] == pytest.approx(error, rel=1e-3)


def test_rows_are_filled_by_one_document(subjects: dict[str, Subject]) -> None:
    subject = subjects["clm"]
    plan = position_loss.prepare(subject, options(rows=12))
    assert plan.length == subject.config.phase.sequence_length
    assert plan.border is None
    assert len(set(plan.rows)) == 12
    batches = [text.build() for text in plan.texts]
    assert all(torch.equal(batch.position_ids, torch.arange(plan.length)) for (batch,) in batches)
    assert position_loss.prepare(subject, options(rows=5)).rows == plan.rows[:5]
    packing = Packing(length=plan.length, max_documents=subject.config.data.max_documents_per_row)
    source = Rows([Source(subject.corpus)], packing, VALIDATION_SEED)
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


def document_losses(subject: Subject, most: int, length: int, attention: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(loss of every token, counted) of the longest documents cut to `length`, one forward for every masked token."""
    model, _ = load_model(subject.checkpoint)
    set_full_attention(model, attention == "full")
    corpus, mask = subject.corpus, subject.corpus.special.mask
    lengths = np.asarray(corpus.document_lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    found = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:most]:
        tokens = corpus.tokens_at(int(starts[number]), min(length, int(lengths[number]))).astype(np.int64)
        losses, counted = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=bool)
        with torch.inference_mode():
            if subject.config.model.causal:
                rows = model.logits(model.hidden_states(position_loss.batch_with_labels(tokens, tokens))).double()
                losses[:-1] = F.cross_entropy(rows[:-1], torch.from_numpy(tokens[1:]), reduction="none").numpy()
                counted[:-1] = True
            else:
                for rest in range(STRIDE):
                    places = [p for p in range(rest, len(tokens), STRIDE) if corpus.ordinary[tokens[p]]]
                    inputs = tokens.copy()
                    inputs[places] = mask
                    rows = model.logits(model.hidden_states(position_loss.batch_with_labels(inputs, tokens))).double()
                    truth = torch.from_numpy(tokens[places])
                    losses[places] = F.cross_entropy(rows[places], truth, reduction="none").numpy()
                    counted[places] = True
        found.append((losses, counted))
    return found


STRIDE, WIDTH, DOCUMENTS, TRAILING = 3, 2048, 24, 100


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("rule", ["present", "complete"])
def test_rules_over_documents(subjects: dict[str, Subject], objective: str, rule: str) -> None:
    subject = subjects[objective]
    length = int(np.sort(subject.corpus.document_lengths)[-5])  # some documents reach it, others do not
    length = min(length, WIDTH)
    given = options(
        length=length, rows=DOCUMENTS, rule=rule, mask_stride=STRIDE, trailing=TRAILING, buckets=4, border=length // 2
    )
    result = position_loss.run(subject, position_loss.prepare(subject, given))
    assert (result["rule"], result["rows"]) == (rule, DOCUMENTS)
    attention, curve = next(iter(result["curves"].items()))
    documents = document_losses(subject, DOCUMENTS, length, attention)
    sizes = {len(losses) for losses, _ in documents}
    assert len(sizes) > 1
    assert max(sizes) == length
    fewer = []
    for bucket in curve["buckets"]:
        start, end = bucket["start"], bucket["end"]
        if rule == "complete":
            chosen = [pair for pair in documents if len(pair[0]) >= end]
        else:
            chosen = [pair for pair in documents if pair[1][start:end].any()]
        counted = np.concatenate([losses[start:end][kept[start:end]] for losses, kept in chosen])
        assert (bucket["documents"], bucket["tokens"]) == (len(chosen), len(counted))
        assert bucket["loss"] == pytest.approx(counted.mean(), rel=1e-5)
        fewer.append(len(chosen))
    assert fewer[-1] < fewer[0]

    whole = [losses[-TRAILING:][kept[-TRAILING:]] for losses, kept in documents if len(losses) == length]
    trailing = curve["trailing"]
    assert (trailing["last"], trailing["documents"]) == (TRAILING, len(whole))
    assert trailing["loss"] == pytest.approx(np.concatenate(whole).mean(), rel=1e-5)
    everything = np.concatenate([losses[kept] for losses, kept in documents])
    assert curve["all"]["loss"] == pytest.approx(everything.mean(), rel=1e-5)
    assert curve["perplexity"] == pytest.approx(np.exp(everything.mean()), rel=1e-5)


def test_every_token_of_a_document_is_masked_once(subjects: dict[str, Subject]) -> None:
    subject = subjects["mlm"]
    given = options(length=256, rows=3, rule="present", mask_stride=STRIDE)
    for text in position_loss.prepare(subject, given).texts:
        batches = text.build()
        assert len(batches) == STRIDE
        masked = np.stack([(batch.labels != -100).numpy() for batch in batches])
        ordinary = subject.corpus.ordinary[np.where(masked, np.stack([b.labels for b in batches]), 0).sum(0)]
        assert masked.sum(0).max() == 1
        assert (masked.sum(0) == 1).sum() > 0.9 * text.length
        assert ordinary[masked.any(0)].all()
        for batch, places in zip(batches, masked, strict=True):
            assert (batch.input_ids.numpy()[places] == subject.corpus.special.mask).all()
