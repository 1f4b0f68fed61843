"""Tensor and sequence parallelism equal the single process in float64: loss and every gradient."""

import pytest

from neomoba_dist.config import ParallelConfig
from tests.equivalence import assemble, assert_same, parallel_rank, single_process
from tests.models import tiny_batch, tiny_model
from tests.ranks import run_ranks

LAYOUTS = {
    "tp2": (2, False),
    "tp2_sp": (2, True),
    "tp4": (4, False),  # more ranks than the two KV heads: these are replicated
    "tp4_sp": (4, True),
}


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("full", [False, True], ids=["moba", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients(layout: str, full: bool, objective: str) -> None:
    size, sequence_parallel = LAYOUTS[layout]
    # untied for one objective, tied for the other, so that both heads meet every layout
    config = tiny_model(objective=objective, tie_word_embeddings=objective == "clm")
    batches = [tiny_batch(0, objective=objective), tiny_batch(1, objective=objective)]
    loss, gradients = single_process(config, batches, full)
    assert all(g.abs().max() > 0 for g in gradients.values())
    if not full:
        assert abs(loss - single_process(config, batches, True)[0]) > 1e-3, "sparse must differ from full"
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    results = run_ranks(size, parallel_rank, config, parallel, batches, full)
    for rank_loss, _ in results:
        assert abs(rank_loss - loss) < 1e-12 * abs(loss)
    assert_same(assemble([grads for _, grads in results]), gradients, rtol=1e-10)
