"""Log-likelihoods of a long text hold the hidden states and one chunk of logits; full logits never exist."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evals.efficiency_passes import text_batch
from evals.load import Subject
from neomoba_dist.model.cross_entropy import CHUNK_TOKENS, vocab_parallel_scores

TOKENS = 4 * CHUNK_TOKENS


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still held; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        self.outside: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.outside.append(tensor.untyped_storage())
                self.known.add(self.outside[-1]._cdata)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def test_the_count_is_right() -> None:
    with LiveBytes() as count:
        first = torch.ones(1000)
        second = first + first
        del first
        third = second.view(10, 100)
        del second
        third.add_(1)
    assert count.peak == 2 * 4000
    assert count.live == 4000
    del third
    assert count.live == 0


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_one_chunk_of_logits_is_held(subjects: dict[str, Subject], kind: str) -> None:
    subject = subjects[kind]
    subject.model.use("moba")
    batch = text_batch(subject, TOKENS)
    hidden = subject.model.stage.run(batch)
    assert hidden is not None
    weight = subject.model.stage.output_matrix
    chunk = CHUNK_TOKENS * weight.shape[0] * 4
    labels = batch.labels.clamp(min=0)
    with LiveBytes() as scoring:
        scores, _ = vocab_parallel_scores(hidden, weight, labels, subject.model.mesh)
    assert chunk < scoring.peak < 1.05 * chunk
    assert len(scores) == TOKENS

    with torch.inference_mode(), LiveBytes() as layers:
        subject.model.stage.run(batch)
    with LiveBytes() as together:
        subject.model.log_likelihoods(batch)
    states = TOKENS * subject.config.model.hidden_size * 4
    assert together.peak < max(layers.peak, 1.05 * chunk + 2 * states) + 16 * TOKENS
