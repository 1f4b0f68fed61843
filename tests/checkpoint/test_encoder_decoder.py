"""Checkpoints of an encoder-decoder: resumed at any layout, and refused where nothing runs them."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.load import Layout
from neomoba_dist.checkpoint.hf_families import describe
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.config import Config, ConfigError
from neomoba_dist.model.encoder_decoder import EncoderDecoder
from tests.checkpoint.test_layouts import assert_goes_on, whole_tensors
from tests.corpora import make_corpus
from tests.equivalence import assemble, pieces
from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@functools.cache
def corpus() -> Path:
    """With sentinels; for the whole test session."""
    keeper = tempfile.TemporaryDirectory(prefix="neomoba-sentinels-")
    corpus.keeper = keeper  # type: ignore[attr-defined] - lives as long as the cache
    return make_corpus(Path(keeper.name), sentinels=10).folder


def pair_config(layout: dict[str, Any], stage: int = 1) -> Config:
    model = {"objective": "span_corruption", "num_decoder_layers": 2, "dropout": 0.1}
    config = run_config(layout, stage, model=model)
    folder = str(corpus())
    return replace(config, data=replace(config.data, train=folder, validation=folder))


def test_resume_at_any_layout(tmp_path: Path) -> None:
    """Bit for bit at the same one; and what is loaded is the whole model."""
    config, whole = pair_config({}, stage=2), tmp_path / "whole"
    run_ranks(2, train_here, config, whole, 6)
    assert_goes_on(whole, tmp_path / "same", config, 2, same=True)
    assert_goes_on(whole, tmp_path / "tp2_sp", pair_config(TP2), 2, same=False)
    model, _ = load_model(whole)
    assert isinstance(model, EncoderDecoder)
    tensors = whole_tensors(whole / "checkpoints" / "step_6")
    for name, value in assemble([pieces(model, "data")]).items():
        assert torch.equal(value, tensors[f"model.{name}"]), name
    losses = [line["validation_loss"] for line in metrics(whole) if "validation_loss" in line]
    assert losses[-1] < losses[0]


def test_what_does_not_run_it_says_so() -> None:
    config = pair_config({})
    for layout, key in ((Layout(pp=2), "pipeline_model"), (Layout(cp=2), "context")):
        with pytest.raises(ConfigError, match=rf"{key}_parallel_size 2 does not work with an encoder-decoder"):
            layout.config(config)
    with pytest.raises(CheckpointError, match="no counterpart of an encoder-decoder"):
        describe(config.model)
