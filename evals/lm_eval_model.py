"""Our model as a model of lm-evaluation-harness.

To lm-eval every rank is rank 0 of 1: all ranks build the same requests. They are dealt out by `Workers`, so that one
model-parallel group is one worker, batches are ours, an interrupted run goes on, and workers that share experts step
together. Everybody has all answers. Nothing is ever cut from a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.cli import EvalError
from evals.load import Subject
from evals.work import Item, ItemError
from neomoba_dist.generate.stage import GenerationError, batch_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256  # as lm-eval's own models
Scored = tuple[float, bool]


class ShardedLM(TemplateLM):
    """A checkpoint on any layout, with one kind of attention over prompts."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._subject, self._tokenizer = subject, subject.tokenizer
        self._head, end = subject.tokenizer.document_borders
        self._end = end[-1] if end else subject.tokenizer.special.eos

    @property
    def eot_token_id(self) -> int:
        """The end of a document. Raises EvalError where the tokenizer has none."""
        if self._end is None:
            raise EvalError("lm_eval: the tokenizer has no token that ends a text; train one with data_tools")
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: what began every document in training."""
        return self._head[0] if self._head else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return self._subject.config.model.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests."""
        return self._tokenizer.sha256[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, after the token that begins a document."""
        return (self._head if add_special_tokens is not False else []) + self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """(log p of the continuation in nats, whether it is the greedy one) of each request."""
        found = self._scores([(context, continuation) for _, context, continuation in requests])
        return [(nats, greedy) for nats, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats; a text longer than `max_length` in windows that do not overlap."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (nats, _) in zip(owner, self._scores(windows), strict=True):
            sums[number] += nats
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answers, cut before the first of each request's `until`. Raises EvalError for sampling."""
        subject = self._subject
        items = []
        for request in requests:
            context, settings = request.args
            if settings.get("do_sample") or settings.get("temperature", 0.0) > 0:
                raise EvalError(f"lm_eval:{request.task_name}: samples its answers; only greedy tasks can be run")
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            tokens = self.tok_encode(context)
            key = subject.key("generate", torch.tensor(tokens).numpy().tobytes(), most, *until)
            items.append(Item(key, len(tokens) + most, (tokens, most, until)))
        self._check_length([item.tokens for item in items])

        def measure(batch: list[tuple[list[int], int, list[str]]]) -> list[dict[str, Any]]:
            def stop(document: int, ids: list[int]) -> bool:
                text = self._tokenizer.decode(ids)
                return any(end in text for end in batch[document][2])

            prompts, most, _ = zip(*batch, strict=True)
            try:
                found = subject.model.generate(prompts, most, self.eot_token_id, stop)
            except GenerationError as error:
                raise ItemError(str(error)) from error
            texts = map(self._tokenizer.decode, found)
            return [{"text": before(text, until)} for text, (_, _, until) in zip(texts, batch, strict=True)]

        return [entry["text"] for entry in self._run("lm_eval, answers", items, measure)]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """(log p, greedy) of the second ids after the first."""
        subject = self._subject
        items = []
        for context, continuation in pairs:
            tokens = [*context, *continuation]
            key = subject.key("log p", torch.tensor(tokens).numpy().tobytes(), len(continuation))
            items.append(Item(key, len(tokens), (tokens, len(continuation))))
        self._check_length([item.tokens for item in items])

        def measure(batch: list[tuple[list[int], int]]) -> list[dict[str, Any]]:
            # the last token is only predicted
            rows = batch_of([tokens[:-1] for tokens, _ in batch], "cpu")
            labels, ends = torch.full_like(rows.labels, -100), rows.cu_seqlens[1:].tolist()
            for end, (tokens, scored) in zip(ends, batch, strict=True):
                labels[end - scored : end] = torch.tensor(tokens[len(tokens) - scored :])
            nats, first = subject.model.log_likelihoods(replace(rows, labels=labels))
            return [
                {"nats": nats[end - n : end].double().sum().item(), "greedy": bool(first[end - n : end].all())}
                for end, (_, n) in zip(ends, batch, strict=True)
            ]

        return [(entry["nats"], entry["greedy"]) for entry in self._run("lm_eval, log p", items, measure)]

    def _run(self, what: str, items: list[Item[Any]], measure: Any) -> list[dict[str, Any]]:
        found = self._subject.workers.run(what, items, measure)
        failed = [entry["error"] for entry in found if "error" in entry]
        if failed:  # lm-eval has no place for a missing answer
            raise EvalError(f"{what}: {len(failed)} of {len(found)} requests failed: {failed[0]}")
        return found

    def _check_length(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._subject.check_length("lm_eval: the longest request of", max(tokens))


def before(text: str, ends: Sequence[str]) -> str:
    """`text` up to the first of `ends`."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text
