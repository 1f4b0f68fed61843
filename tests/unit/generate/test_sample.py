"""Sampling: the filters' distributions, the same text whatever the batch, what is refused."""

import math
from typing import Any

import pytest
import torch

from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.sample import Sampler, Sampling
from neomoba_dist.generate.stage import GenerationError, Stage
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import random_documents
from tests.models import tiny_model

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])


class Fixed:
    """A stage whose logits are always the same."""

    def whole_logits(self, hidden: Any, documents: int) -> torch.Tensor:
        return LOGITS.repeat(documents, 1)


def shares(sampling: Sampling, prompt: tuple[int, ...] = (4,), draws: int = 4000) -> torch.Tensor:
    """How often each token comes as the first one, over many documents."""
    sampler = Sampler(sampling, [prompt] * draws)
    tokens = sampler.choose(Fixed(), None, range(draws))  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(tokens), minlength=5) / draws


def softmax_of(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = torch.full_like(LOGITS, -torch.inf)
    logits[kept] = LOGITS[kept] / temperature
    return logits.softmax(0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 2}, [0, 1]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 1]),  # 0.643 + 0.237
        ({"temperature": 1.0, "min_p": 0.1}, [0, 1, 2]),  # exp(-2) of the best, not exp(-3)
        ({"temperature": 2.0, "top_k": 3}, [0, 1, 2]),
    ],
)
def test_tokens_come_as_often_as_the_distribution_says(settings: dict[str, Any], kept: list[int]) -> None:
    expected = softmax_of(kept, settings["temperature"])
    found = shares(Sampling(**settings, seed=3))
    error = 4 * (expected * (1 - expected) / 4000).sqrt()
    assert ((found - expected).abs() <= error + 1e-9).all(), found


def test_tokens_that_stand_already_are_penalised() -> None:
    greedy = Sampling(repetition_penalty=3.0)
    assert shares(greedy, prompt=(0,), draws=3).tolist() == [0, 1, 0, 0, 0], "2 / 3 is less than 1"
    assert shares(greedy, prompt=(4,), draws=3).tolist() == [1, 0, 0, 0, 0]
    assert not greedy.greedy
    assert Sampling().greedy


@pytest.fixture(scope="module")
def stage() -> Stage:
    config = tiny_model(objective="clm", initializer_range=0.3)
    return Stage.of(NeoBERT(config, Mesh.single(), seed=5))


def test_the_batch_changes_no_text(stage: Stage) -> None:
    """What is drawn for a document depends on its number alone, and another seed draws another text."""
    documents = random_documents((9, 3, 17))
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=1)
    together = generate(stage, documents, 12, sampling=sampling)
    assert generate(stage, documents[:1], 12, sampling=sampling) == together[:1]
    assert generate(stage, documents, 12, prefill_chunk=4, sampling=sampling) == together
    assert generate(stage, documents, 12, sampling=Sampling(temperature=1.0, top_p=0.95, seed=2)) != together
    assert generate(stage, documents, [12, 5, 12], sampling=sampling) == [
        ids[:n] for ids, n in zip(together, [12, 5, 12], strict=True)
    ]


def test_without_a_temperature_it_is_the_greedy_text(stage: Stage) -> None:
    documents = random_documents((9, 3))
    cold = Sampling(temperature=1e-6)
    assert generate(stage, documents, 10, sampling=cold) == generate(stage, documents, 10)
    assert generate(stage, documents, 10, sampling=Sampling(temperature=1.0, top_k=1)) == generate(stage, documents, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature: give a number at least 0"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"temperature": 1.0, "min_p": 1.5}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"top_k": 5}, "give --temperature too"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**settings)
