"""Fine-tuning on responses: packed, on every axis, it has the loss of a loop over the examples one by one."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neomoba_dist.config import Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.chat import encode_pair
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.assemble import build_stream, open_corpora
from tests.chats import pairs, shared_chats
from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

LAYOUTS = {
    "dp2_zero3": (2, {}, 3),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 1),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 1),
    "cp2": (2, {"context_parallel_size": 2}, 2),
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return open_corpus(shared_chats())


def sft_config(corpus: Corpus, layout: dict[str, int], stage: int) -> Config:
    model = {"objective": "clm", "num_hidden_layers": 2}  # one with MoBA, one full
    config = run_config(layout, stage, model=model, full_attention_fraction=0.0)
    return replace(config, data=replace(config.data, train=corpus.name, validation=None, packing="whole"))


def loop(config: Config, corpus: Corpus) -> tuple[float, int]:
    """The mean loss of the responses' tokens of the first update, one example at a time, and their number."""
    model = NeoBERT(config.model, Mesh.single(), seed=config.phase.seed)
    tokenizer = corpus.tokenizer()
    examples = (encode_pair(pair["prompt"], pair["response"], tokenizer) for pair in pairs())
    spans = {tuple(example.ids): example.spans[0] for example in examples}
    batches, _ = next(iter(build_stream(config, config.plan(1), open_corpora(config).train, 0)))
    total, counted = 0.0, 0
    for batch in batches:
        for start, stop in pairwise(batch.cu_seqlens.tolist()):
            ids = batch.input_ids[start:stop]
            if tuple(ids.tolist()) not in spans:
                continue  # padding
            first, last = spans[tuple(ids.tolist())]
            with torch.no_grad():
                logits = model.logits(model.hidden_states(single(ids)))
            total += float(F.cross_entropy(logits[first - 1 : last - 1], ids[first:last], reduction="sum"))
            counted += last - first
    return total / counted, counted


def single(ids: torch.Tensor) -> Batch:
    """One document without a neighbour."""
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    rest = {"labels": ids, "position_ids": torch.arange(len(ids)), "row_ids": torch.zeros(1, dtype=torch.int64)}
    return Batch(input_ids=ids, cu_seqlens=borders, num_valid=1, **rest)


@pytest.fixture(scope="module")
def one(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three steps of one process; the first loss is that of the loop."""
    config, folder = sft_config(corpus, {}, 1), tmp_path_factory.mktemp("one")
    run_ranks(1, train_here, config, folder, 3)
    steps = metrics(folder)
    loss, counted = loop(config, corpus)
    assert steps[0]["valid_tokens"] == counted
    assert steps[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert len({step["loss"] for step in steps}) == len({step["valid_tokens"] for step in steps}) == 3
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout: str, corpus: Corpus, one: list[dict[str, Any]], tmp_path: Path) -> None:
    world, parallel, stage = LAYOUTS[layout]
    run_ranks(world, train_here, sft_config(corpus, parallel, stage), tmp_path, 3)
    for expected, found in zip(one, metrics(tmp_path), strict=True):
        assert found["valid_tokens"] == expected["valid_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)
