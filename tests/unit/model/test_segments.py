"""Segments and the head for pairs, in float64 against their formulas."""

from dataclasses import replace

import torch

from neomoba_dist.config.text_tasks import TEXT_TASKS
from neomoba_dist.generate.stage import Stage, batch_of
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.neobert import NeoBERT, layer_list
from neomoba_dist.model.segments import NextSentence, SegmentEmbedding
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.optim import parameter_groups
from tests.models import tiny_batch, tiny_model
from tests.pairs import PAIRS, pair_batch, with_counts


def make_model(**changes: object) -> NeoBERT:
    return NeoBERT(tiny_model(**PAIRS, **changes), Mesh.single(), dtype=torch.float64, seed=5)


def test_segments_are_added_to_the_embedding() -> None:
    model, batch = make_model(position_embedding="learned"), pair_batch(3)
    seen: dict[str, torch.Tensor] = {}
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(x=given[0][0]))
    model.hidden_states(batch)
    assert model.segments is not None
    assert model.positions is not None
    assert batch.token_type_ids is not None
    expected = model.embedding.weight[batch.input_ids] + model.positions.weight[batch.position_ids]
    for token, kind in enumerate(batch.token_type_ids.tolist()):
        expected[token] += model.segments.weight[kind]
    torch.testing.assert_close(seen["x"], expected, rtol=0, atol=1e-14)
    model.hidden_states(replace(batch, token_type_ids=None))
    single = expected - model.segments.weight[batch.token_type_ids] + model.segments.weight[0]
    torch.testing.assert_close(seen["x"], single, rtol=0, atol=1e-14)


def test_the_head_and_both_losses() -> None:
    model = make_model()
    (batch,) = with_counts([pair_batch(3)])
    head = model.next_sentence
    assert head is not None
    with torch.no_grad():
        head.dense_bias.add_(0.3)
        head.output_bias[1] = 0.5
    assert batch.pairs is not None
    assert batch.next_sentence_labels is not None
    assert batch.pairs.tolist() == [0, 49, 59, 1], "three of them, and one of no pair"
    (tokens, pairs, right), _ = model(batch)
    hidden, loss, told = model.hidden_states(batch), torch.zeros((), dtype=torch.float64), 0
    for start in (0, 49, 59):
        pooled = torch.tanh(head.dense @ hidden[start] + head.dense_bias)
        logits = head.output @ pooled + head.output_bias
        label = int(batch.next_sentence_labels[start])
        loss = loss + torch.logsumexp(logits, 0) - logits[label]
        told += int(logits.argmax()) == label
    torch.testing.assert_close(pairs, loss, rtol=0, atol=1e-12)
    assert int(right.detach()) == told
    torch.testing.assert_close(tokens, model.token_losses(batch).sum(), rtol=0, atol=1e-12)
    found = torch.autograd.grad(pairs, list(head.parameters()))
    wanted = torch.autograd.grad(loss, list(head.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_batch_without_pairs() -> None:
    """None of them with a label: no loss, and gradients that are zero; texts of which nobody asks: the usual sum."""
    model = make_model()
    (empty,) = with_counts([pair_batch(0)])
    tokens, pairs, right = model(empty)[0]
    assert (float(pairs.detach()), int(right.detach())) == (0, 0)
    pairs.backward()
    assert model.next_sentence is not None
    assert all(not p.grad.any() for p in model.next_sentence.parameters())
    plain = model(replace(empty, next_sentence_labels=None, pairs=None))[0]
    assert plain.dim() == 0
    assert torch.equal(plain, tokens)


def test_layers_by_configuration() -> None:
    init = Initializer(Mesh.single(), 0, 0.02)

    def kinds(**settings: object) -> list[type]:
        head = TEXT_TASKS["rte"].head("cls", 1.0) if settings.pop("text", False) else None
        return [layer.cls for layer in layer_list(tiny_model(**settings), init, text_head=head)]

    assert not {SegmentEmbedding, NextSentence} & set(kinds())
    assert SegmentEmbedding in kinds(type_vocab_size=2)
    assert NextSentence not in kinds(type_vocab_size=2)
    assert kinds(**PAIRS)[-2] is NextSentence
    assert NextSentence not in kinds(**PAIRS, text=True)
    assert SegmentEmbedding in kinds(**PAIRS, text=True)


def test_no_weight_decay_of_segments() -> None:
    groups = {group["name"]: group["params"] for group in parameter_groups(make_model().parameters(), 0.1)}
    plain, decayed = ({shard_of(p).name for p in groups[name]} for name in ("no_decay", "decay"))
    assert "embedding.token_types" in plain
    assert {"next_sentence.dense.weight", "next_sentence.output.weight"} <= decayed


def test_texts_in_evaluation() -> None:
    """A Stage adds segments: those given, or all of type 0."""
    model = make_model().eval()
    ids = tiny_batch(0).input_ids[:49].tolist()
    types = [0] * 20 + [1] * 29
    stage = Stage.of(model)
    for given in (None, [types]):
        batch = batch_of([ids], "cpu", given)
        with torch.no_grad():
            expected = model.hidden_states(batch)
        torch.testing.assert_close(stage.run(batch), expected, rtol=0, atol=1e-12)
    assert (stage.run(batch_of([ids], "cpu")) - expected).abs().max() > 1e-3  # type: ignore[operator]
