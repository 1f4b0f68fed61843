"""Choosing the next token by chance: temperature, top-k, top-p, min-p and a penalty on repetitions.

The filters are those of `transformers`. Every document has random numbers of its own, keyed by (seed, number of the
document), and one is used per token: what is drawn depends neither on the batch nor on the layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neomoba_dist.generate.stage import GenerationError, Stage


@dataclass(frozen=True)
class Sampling:
    """What is drawn from. temperature: 0 takes the likeliest token. None or 1.0 (repetition_penalty): not used.

    Raises GenerationError, which names the command line's flag.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, holds, right in (
            ("--temperature", self.temperature >= 0, "at least 0"),
            ("--top-k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("--top-p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("--repetition-penalty", self.repetition_penalty > 0, "above 0; 1 is none"),
        ):
            if not holds:
                raise GenerationError(f"{flag}: give a number {right}")
        if not self.temperature and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise GenerationError("--top-k, --top-p and --min-p choose what to draw from; give --temperature too")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return not self.temperature and self.repetition_penalty == 1


class Sampler:
    """Draws the tokens that follow each of some prompts."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        from transformers.generation import logits_process as filters

        self._drawn = bool(sampling.temperature)
        self._texts = [list(prompt) for prompt in prompts]
        self._draws = [random.Random(f"{sampling.seed}/{number}") for number in range(len(prompts))]
        self._filters = filters.LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._filters.append(filters.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self._drawn:
            self._filters.append(filters.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            self._filters.append(filters.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            self._filters.append(filters.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            self._filters.append(filters.MinPLogitsWarper(sampling.min_p))

    def choose(self, stage: Stage, hidden_NH: torch.Tensor | None, documents: Sequence[int]) -> list[int]:
        """The next token of each of `documents`, on every rank. hidden_NH: on the last stage, one row for each."""
        logits_NV = stage.whole_logits(hidden_NH, len(documents))
        tokens = []
        for document, logits_V in zip(documents, logits_NV, strict=True):
            ids: Any = torch.tensor([self._texts[document]])
            filtered_V = self._filters(ids, logits_V[None])[0].double()
            if self._drawn:
                # one number per token, looked up among the running sums of the probabilities
                sums_V = filtered_V.softmax(0).cumsum(0)
                number = self._draws[document].random() * sums_V[-1]
                token = int(torch.searchsorted(sums_V, number, right=True).clamp(max=len(sums_V) - 1))
            else:
                token = int(filtered_V.argmax())
            self._texts[document].append(token)
            tokens.append(token)
        return tokens
