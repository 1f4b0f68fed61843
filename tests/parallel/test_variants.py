"""Attention variants and position schemes under tensor, sequence and pipeline parallelism equal the single process."""

from dataclasses import replace
from typing import Any

import pytest

from neomoba_dist.config import ParallelConfig
from tests.equivalence import assemble, assert_same, parallel_rank, single_process
from tests.models import tiny_batch, tiny_model
from tests.parallel.test_engines import check, make_config
from tests.ranks import run_ranks

MIXED: dict[str, Any] = {
    "attention": "moba*1,sliding_window*1,full*1",
    "sliding_window": 8,
    "global_tokens": 2,
    "key_conv_width": 3,
}
CASES: list[tuple[int, bool, dict[str, Any]]] = [
    (2, True, {**MIXED, "position_embedding": "alibi"}),
    (2, False, {**MIXED, "position_embedding": "learned", "objective": "clm", "tie_word_embeddings": True}),
    # more ranks than the two KV heads: these, and the convolution over them, are replicated
    (4, True, {**MIXED, "position_embedding": "t5_relative", "objective": "clm"}),
    (4, True, {**MIXED, "position_embedding": "learned"}),
]


@pytest.mark.parametrize(("size", "sequence_parallel", "changes"), CASES)
def test_tensor_parallel(size: int, sequence_parallel: bool, changes: dict[str, Any]) -> None:
    config = tiny_model(**changes)
    batches = [tiny_batch(0, objective=config.objective), tiny_batch(1, objective=config.objective)]
    loss, gradients = single_process(config, batches)
    assert all(g.abs().max() > 0 for g in gradients.values())
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    results = run_ranks(size, parallel_rank, config, parallel, batches, False)
    for rank_loss, _ in results:
        assert abs(rank_loss - loss) < 1e-12 * abs(loss)
    assert_same(assemble([grads for _, grads in results]), gradients, rtol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("position_embedding", ["learned", "t5_relative"])
def test_zero_3(position_embedding: str) -> None:
    # with MoBA some weight's first gradient is 1e-8 here, AdamW's epsilon: rounding then decides on its third step
    changes = {**MIXED, "attention": "sliding_window*2,full*1", "position_embedding": position_embedding}
    config = make_config("mlm", {}, 3)
    check(2, replace(config, model=replace(config.model, **changes)))


def test_pipeline_with_positions_beside_a_tied_embedding() -> None:
    config = make_config("clm", {"pipeline_model_parallel_size": 2}, 1)
    model = replace(config.model, **MIXED, position_embedding="learned")
    assert model.tie_word_embeddings
    check(2, replace(config, model=model))
