"""A model with segments and next-sentence prediction goes on from its checkpoint: bit for bit, and alike by ZeRO-3;
and what else is made of the checkpoint."""

from pathlib import Path

import pytest
import torch

from neomoba_dist.checkpoint.hf import export_folder, open_checkpoint
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.train.checkpoint_plan import plan_checkpoint
from tests.checkpoint.test_layouts import assert_goes_on
from tests.pairs import PAIRS
from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

ROWS = {"sequence_length": 1024, "tokens_per_update": 8192}  # long enough for several documents
MODEL = {**PAIRS, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    axes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    config = run_config(axes, model=MODEL, **ROWS)
    run_ranks(4, train_here, config, folder, 6)
    return folder


def test_it_goes_on(whole: Path, tmp_path: Path) -> None:
    axes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    assert_goes_on(whole, tmp_path / "same", run_config(axes, model=MODEL, **ROWS), 4, same=True)
    for name in ("next_sentence_loss", "next_sentence_accuracy", "token_loss"):
        assert [line.get(name) for line in metrics(tmp_path / "same")] == [
            line.get(name) for line in metrics(whole)[3:]
        ]
    sharded = run_config({}, 3, deepspeed={"train_micro_batch_size_per_gpu": 4}, model=MODEL, **ROWS)
    assert_goes_on(whole, tmp_path / "zero3", sharded, 2, same=False)


def test_the_log_has_both_losses(whole: Path) -> None:
    """An update without pairs has no loss of pairs."""
    lines = [line for line in metrics(whole) if "next_sentence_loss" in line]
    assert len(lines) >= 3
    assert all(line["loss"] == line["token_loss"] for line in metrics(whole) if line not in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line["token_loss"] + line["next_sentence_loss"], rel=1e-6)
        assert 0.1 < line["next_sentence_loss"] < 2
        assert 0 <= line["next_sentence_accuracy"] <= 1
    last = metrics(whole)[-1]
    both = last["validation_token_loss"] + last["validation_next_sentence_loss"]
    assert last["validation_loss"] == pytest.approx(both, rel=1e-6)
    assert 0 <= last["validation_next_sentence_accuracy"] <= 1


def test_plan_and_loads(whole: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(whole)
    held = {name: entry.shape for name, entry in reader.tensors.items() if entry.kind == "model"}
    assert held["model.embedding.token_types"] == (2, 32)
    assert held["model.next_sentence.dense.weight"] == (32, 32)
    assert plan_checkpoint(reader.config, 4).parameters == sum(torch.Size(shape).numel() for shape in held.values())
    model, _ = load_model(whole)
    assert model.next_sentence is not None
    later = run_config({}, model={**MODEL, "next_sentence_prediction": False}, **ROWS)
    run_ranks(1, train_here, later, tmp_path / "later", 1, None, whole)  # a phase without the second head
    assert "next_sentence_loss" not in metrics(tmp_path / "later")[0]
    assert "model.embedding.token_types" in CheckpointReader(tmp_path / "later").tensors


def test_the_hub_takes_segments_and_leaves_the_head_for_pairs(whole: Path, tmp_path: Path) -> None:
    export_folder(CheckpointReader(whole), tmp_path / "hub", torch.float32, None)
    back = open_checkpoint(tmp_path / "hub")
    assert back.config.model.type_vocab_size == 2
    assert not back.config.model.next_sentence_prediction
    assert not [name for name in back.tensors if "next_sentence" in name]
    shard = ShardedTensorSpec("embedding.token_types", (2, 32))
    assert torch.equal(back.read("model", shard), CheckpointReader(whole).read("model", shard))
