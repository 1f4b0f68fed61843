"""The passes that `efficiency` times: attention of one layer, the whole model, and decoding, by kind of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.bench._memory import peak_above
from evals.bench._timing import in_turns
from evals.load import Subject
from evals.passkey import read_text
from neomoba_dist.data.batch import IGNORE_LABEL, Batch
from neomoba_dist.generate.decode import Decoder
from neomoba_dist.generate.stage import Stage, batch_of
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.parallel.comm import all_gather_objects, barrier
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.train.memory import is_out_of_memory

FORWARD, BOTH, TOKEN = "forward", "forward + backward", "one token"
NEW_TOKENS = 8  # timed at each length
Works = Mapping[str, Callable[[], None]]  # by kind of attention


@dataclass(frozen=True)
class Pass:
    """One pass to time. held: bytes of each kind, where the peak of the pass says nothing."""

    part: str
    name: str
    works: Works
    repetitions: int
    held: Mapping[str, int] = field(default_factory=dict)


def passes(subject: Subject, length: int, repetitions: int) -> Iterator[Pass]:
    """All passes at one length."""
    stage, kinds = subject.model.stage, subject.attentions
    batch = text_batch(subject, length)
    share = local_share(batch, subject.model.mesh, stage.config).with_counted().to(subject.device)  # as in training
    core, inputs = layer_core(stage, share)
    grad = torch.ones_like(inputs[0])
    loss, weights = partial(token_loss, stage, share), list(stage.parameters())
    timed: tuple[tuple[str, str, Callable[[], None]], ...] = (
        ("attention", FORWARD, lambda: _forward(lambda: core(*inputs))),
        ("attention", BOTH, lambda: _gradients(core(*inputs), inputs, grad)),
        ("model", FORWARD, lambda: _forward(loss)),
        ("model", BOTH, lambda: _gradients(loss(), weights)),
    )
    for part, name, work in timed:
        yield Pass(part, name, dict.fromkeys(kinds, work), repetitions)
    if stage.config.causal:
        text = batch.input_ids.tolist()
        # a sliding window stays one in decoding
        steps = {kind: DecodingStep(stage, text, kind) for kind in kinds if kind == kinds[0] or "moba" in kinds}
        held = {kind: step.decoder.cache.num_bytes() for kind, step in steps.items()}
        yield Pass("decoding", TOKEN, steps, NEW_TOKENS, held)


def text_batch(subject: Subject, length: int) -> Batch:
    """The start of the corpus, repeated where it is shorter, as one document with the labels of training."""
    tokens = np.resize(read_text(subject.corpus, 0, length), length)
    labels = np.append(tokens[1:], IGNORE_LABEL)
    if not subject.config.model.causal:
        every = round(1 / subject.config.data.mlm_probability)
        labels = np.where(np.arange(length) % every == 0, tokens, IGNORE_LABEL)
    return replace(batch_of([tokens.tolist()], "cpu"), labels=torch.from_numpy(labels.astype(np.int64)))


def timed_layer(stage: Stage) -> int:
    """The first sparse layer, or the first of all."""
    return next((number for number, kind in enumerate(stage.kinds) if kind != "full"), 0)


@torch.no_grad()
def layer_core(stage: Stage, share: Batch) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The core of one layer's attention, and its queries, keys and values of a text, which need gradients."""
    block = stage.blocks[timed_layer(stage)]
    inputs = stage_inputs(stage, share)
    packed, state = inputs[-1], inputs
    attention, given = block.attention, []
    hook = attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    for layer in stage.layers:
        state = layer(state)
        if layer is block:
            break
    hook.remove()
    projected = attention.project(given[0], packed)
    core = attention.spread_core if stage.mesh["cp"].size > 1 else attention.core
    tensors = [x.detach().contiguous().requires_grad_() for x in projected]
    return lambda q, k, v: core(q, k, v, packed), tensors


def stage_inputs(stage: Stage, share: Batch) -> tuple[Any, ...]:
    """What the embedding takes, as NeoBERT.states makes it."""
    places, weight = (share.position_ids, share.cu_seqlens), next(stage.parameters())
    return (share.input_ids, *places, PackedTokens.of(*places, stage.config, stage.mesh, weight.dtype))


def token_loss(stage: Stage, share: Batch) -> Tensor:
    """The summed loss of this rank's share, as NeoBERT.forward computes it."""
    embedding, *body, head = stage.layers
    state = embedding(stage_inputs(stage, share))
    for layer in body:
        state = layer(state)
    return head(state, share.labels, share.counted).sum()


class DecodingStep:
    """One token more after a cached text, NEW_TOKENS times and once to warm up; the first call feeds the text."""

    def __init__(self, stage: Stage, text: Sequence[int], kind: str) -> None:
        self.text = text
        decode = "full" if kind == "full" else "moba"
        self.decoder = Decoder(stage, [len(text) + NEW_TOKENS + 1], decode, prefill="moba")

    def __call__(self) -> None:
        if not any(self.decoder.cache.lengths):
            self.decoder.prefill([self.text])
        self.decoder.stage.best_tokens(self.decoder.step([self.text[-1:]]), 1)


def measure(subject: Subject, todo: Pass) -> dict[str, dict[str, Any]]:
    """{"seconds": kind -> those of every repetition, "bytes": kind -> the most at once}, of the slowest rank.

    A kind that does not fit into the memory of a single process is missing.
    """
    mesh, device = subject.model.mesh, subject.device.type

    def begin(kind: str) -> None:
        subject.model.use(kind)
        barrier(mesh)

    peaks = {}
    for kind, work in todo.works.items():
        begin(kind)
        try:
            peaks[kind] = peak_above(work, device)
        except (RuntimeError, MemoryError) as error:
            if mesh["world"].size > 1 or not is_out_of_memory(error):  # other ranks wait for this one
                raise
    fitting = {kind: work for kind, work in todo.works.items() if kind in peaks}
    threads = torch.get_num_threads() * mesh["world"].size
    seconds = in_turns(fitting, device=device, threads=threads, repetitions=todo.repetitions, before=begin)
    ranks = all_gather_objects((seconds, {**peaks, **todo.held}), mesh, "world")
    return {
        "seconds": {kind: [max(times) for times in zip(*(s[kind] for s, _ in ranks), strict=True)] for kind in fitting},
        "bytes": {kind: max(held[kind] for _, held in ranks) for kind in fitting},
    }


def _forward(work: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        work()


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor | None = None) -> None:
    torch.autograd.grad(output, inputs, grad, allow_unused=True)
