"""Context parallelism in training: phase 3 at 32k tokens, and one sequence of 131,072 tokens in 3.5 GiB per rank."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.bench._context_rank import MODEL, long_batch
from neomoba_dist.config import Config, parse_config
from neomoba_dist.train.assemble import build_stream, open_corpora
from neomoba_dist.train.engines import build_engine
from tests.configs import build
from tests.ranks import run_ranks
from tests.runs import build_mesh, metrics, run_config, train_here

TP2_CP2 = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}


def phase3(layout: dict[str, Any], length: int) -> Config:
    """Rows of `length` real tokens, documents of many blocks; the last of five steps with full attention."""
    schedule = {"full_attention_fraction": 0.2, "full_attention_schedule": "tail", "recompute": "full"}
    tree = run_config(layout, 2, steps=5, **schedule).to_dict()
    blocks = tree["neomoba"]
    blocks["model"].update(max_position_embeddings=length, moba_block_size=length // 128)
    blocks["phase"].update(sequence_length=length, tokens_per_update=length)
    blocks["data"].update(validation=None, max_documents_per_row=2048)
    return parse_config({**tree, "train_micro_batch_size_per_gpu": 1})


@pytest.mark.timeout(900)  # four minutes alone on two cores
@pytest.mark.parametrize("length", [1024, pytest.param(32768, marks=pytest.mark.full)])
def test_phase_3(length: int, tmp_path: Path) -> None:
    config = phase3({}, length)
    batches, _ = next(iter(build_stream(config, config.plan(1), open_corpora(config).train, dp_rank=0)))
    assert batches[0].cu_seqlens.diff().max() > 20 * config.model.moba_block_size
    runs = {}
    for name, world, layout in (("one", 1, {}), ("four", 4, {**TP2_CP2, "sequence_parallel": True})):
        run_ranks(world, train_here, phase3(layout, length), tmp_path / name, 5, timeout=280)
        runs[name] = metrics(tmp_path / name)
    assert [line["full_attention"] for line in runs["four"]] == [False] * 4 + [True]
    for one, four in zip(runs["one"], runs["four"], strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert four["valid_tokens"] == one["valid_tokens"]
        assert four["received_mib_cp"] > 0
        assert "received_mib_cp" not in one


def long_rank(tokens: int, steps: int) -> tuple[list[float], int]:
    """Losses of some optimizer steps on one sequence, and the most bytes that this process held for them."""
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the parent, which may have run many tests
    model = {name: value for name, value in vars(MODEL).items() if name != "max_position_embeddings"}
    config = build(
        {
            "neomoba.model": {**model, "max_position_embeddings": tokens},
            "neomoba.parallel.context_parallel_size": 4,
            "neomoba.phase.sequence_length": tokens,
            "neomoba.phase.tokens_per_update": tokens,
            "train_micro_batch_size_per_gpu": 1,
        }
    )
    engine = build_engine(config, config.plan(4), build_mesh(config))
    engine.set_full_attention(False)
    batch = long_batch(tokens)
    losses = [engine.update([replace(batch)], 1e-2).loss for _ in range(steps)]
    return losses, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began) * 1024


def check_long(tokens: int, steps: int) -> None:
    torch.set_num_threads(1)
    results = run_ranks(4, long_rank, tokens, steps, timeout=2400)
    for losses, peak in results:
        assert losses == results[0][0]
        assert losses[-1] < losses[0] - 0.05
        assert tokens < 131072 or peak < 3.5 * 2**30


def test_one_sequence_of_8k_tokens_over_four_ranks() -> None:
    check_long(8192, 2)


@pytest.mark.full
@pytest.mark.timeout(2700)
def test_one_sequence_of_128k_tokens_over_four_ranks() -> None:
    check_long(131072, 2)
