"""Decoding of a batch of prompts of different lengths, on tensor-, context- and pipeline-parallel models.

An encoder-decoder's encoder reads a text for each prompt, once; the keys and values of cross attention are then kept.

Prompts are fed in chunks, then one token per document and step. All tokens of a step are packed, with the borders of
their documents in cu_seqlens, as in training. MoBA layers decode with full attention, as the paper's authors do
(arXiv 2502.13189, section 3.3), or with MoBA, choosing the blocks that a pass over the whole text would choose.

Shape letters: T new tokens of all documents, N documents, H hidden size, v vocabulary rows of this rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar, cast

import torch

from neomoba_dist.config import ModelConfig
from neomoba_dist.generate.sample import Sampler, Sampling
from neomoba_dist.generate.stage import GenerationError, Stage, Texts, batch_of, rows_at
from neomoba_dist.model.attention.cache import KVCache
from neomoba_dist.model.attention.context.cache import ShardedKVCache
from neomoba_dist.model.attention.packed import Memory
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.context_split import local_share, padded_split
from neomoba_dist.parallel.documents import check_cu_seqlens

DECODES = ("full", "moba")
T = TypeVar("T")
GREEDY = Sampling()
Choose = Callable[[Stage, torch.Tensor | None, Sequence[int]], list[int]]


class Decoder:
    """One rank's part of decoding. All ranks of a model call the same methods with the same tokens.

    capacities: most tokens of every document, prompt included. decode: "full" or "moba", what MoBA layers run; full and
    sliding-window layers stay what they are. prefill: the same for the first step alone, and for an encoder (default:
    as `decode`); the paper evaluates with MoBA in prefill and full attention after it. Raises GenerationError where the
    model or the layout cannot be decoded.
    """

    def __init__(
        self, stage: Stage, capacities: Sequence[int], decode: str = "full", prefill: str | None = None
    ) -> None:
        config = stage.config
        if not config.causal:
            raise GenerationError(
                'generation needs a causal model: neomoba.model.objective is "mlm", train one with "clm"'
            )
        for name, value in (("decode", decode), ("prefill", prefill or decode)):
            if value not in DECODES:
                raise GenerationError(f"{name} must be one of {', '.join(DECODES)}, got {value!r}")
        if stage.mesh.sequence_parallel:
            raise GenerationError("decoding needs a mesh without sequence parallelism; set sequence_parallel to false")
        _require_positions(config, max(capacities))
        self.stage, self.mesh = stage.eval(), stage.mesh  # experts have a capacity in training only
        weight = next(stage.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        kinds = [_kind(kind, decode) for kind in stage.kinds]
        num_kv_heads = stage.blocks[0].attention.num_kv_heads
        self.cache: KVCache
        if self.mesh["cp"].size > 1:
            self.cache = ShardedKVCache(config, kinds, num_kv_heads, capacities, self.dtype, self.mesh)
        else:
            self.cache = KVCache(config, kinds, num_kv_heads, capacities, self.dtype, self.device)
        for layer, kind in zip(self.cache.layers, stage.kinds, strict=True):
            layer.prefill_kind = _kind(kind, prefill or decode)
        self.read_kind = prefill or decode
        self.memory: Memory | None = None

    @torch.no_grad()
    def read(self, sources: Sequence[Sequence[int]] | None) -> None:
        """Let the encoder of an encoder-decoder read a text for each document, before anything else."""
        encoder = self.stage.encoder
        if (sources is None) != (encoder is None):
            raise GenerationError("an encoder-decoder needs sources, which its encoder reads, and other models none")
        if sources is None or encoder is None:
            return
        _require_positions(encoder.config, max(map(len, sources)))
        for block, kind in zip(encoder.blocks, encoder.kinds, strict=True):
            if kind == "moba":
                block.attention.full = self.read_kind == "full"
        self.memory = self.stage.read(batch_of(sources, self.device))

    @torch.no_grad()
    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Feed the next tokens of every document (none where the list is empty).

        Returns the hidden states after the final norm, [T, H] in document order, on the last stage; None on others.
        """
        counts = [len(ids) for ids in tokens]
        borders = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        check_cu_seqlens(borders, sum(counts))
        cu_seqlens = borders.to(self.device)
        position_ids = self.cache.begin(counts)
        input_ids = torch.tensor([i for ids in tokens for i in ids], dtype=torch.int64, device=self.device)
        return self.stage.run(Texts(input_ids, position_ids, cu_seqlens), self.cache.layers, self.memory)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Feed whole prompts, first of all. Returns the hidden states of their last tokens, [N, H], on the last stage.

        Under context parallelism every rank computes its share of the tokens, as in training, and keeps its share of
        the keys; the layers' keys travel once.
        """
        ends = [end - 1 for end in accumulate(len(ids) for ids in prompts)]
        if self.mesh["cp"].size == 1:
            hidden = self.step(prompts)
            return None if hidden is None else hidden[ends]
        assert isinstance(self.cache, ShardedKVCache)
        batch = batch_of(prompts, self.device)
        self.cache.begin([len(ids) for ids in prompts])
        self.cache.prefilling = padded_split(len(batch.input_ids), self.mesh, self.stage.config)
        hidden = self.stage.run(local_share(batch, self.mesh, self.stage.config), self.cache.layers)
        split, self.cache.prefilling = self.cache.prefilling, None
        return None if hidden is None else rows_at(hidden, torch.tensor(ends, device=self.device), self.mesh, split)

    @torch.no_grad()
    def idle(self) -> None:
        """Take part in a step of other data-parallel ranks that need this one's experts."""
        for block in self.stage.blocks:
            if isinstance(block.mlp, MoE):
                nothing = torch.zeros(1, self.stage.config.hidden_size, dtype=self.dtype, device=self.device)
                block.mlp(nothing, torch.zeros(1, dtype=torch.int64, device=self.device))


def _require_positions(config: ModelConfig, tokens: int) -> None:
    """Raises GenerationError where learned positions end before `tokens`."""
    if config.position_embedding == "learned" and tokens > config.max_position_embeddings:
        raise GenerationError(
            f"{tokens} tokens are more than the {config.max_position_embeddings} positions that the model "
            "learned (neomoba.model.max_position_embeddings); ask for fewer"
        )


def _kind(kind: str, wanted: str) -> str:
    """What a layer runs: its own kind, or full attention where MoBA is not wanted."""
    return "full" if kind == "moba" and wanted == "full" else kind


def generate(
    stage: Stage,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    decode: str = "full",
    prefill: str | None = None,
    prefill_chunk: int | None = None,
    stop_id: int | Sequence[int | None] | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """The continuation of every prompt, up to `max_new_tokens` ids and without `stop_id`, which ends it.

    max_new_tokens, stop_id: of all, or of each. sources: for an encoder-decoder, what its encoder reads for each
    prompt, which is what its decoder begins with. sampling: how a token is chosen. prefill: see `Decoder`.
    prefill_chunk: most tokens of one prompt that are fed at a time; None: all, each computed by one context-parallel
    rank. stop: (document, ids so far) -> whether that is enough. Where experts lie on several data-parallel ranks, all
    of these call this together, each with its own prompts; who is done early idles until the last one is. Raises
    GenerationError, see `Decoder`.
    """
    if not prompts or not all(prompts) or not all(sources or prompts):
        raise GenerationError("a prompt is empty; give every document at least one token")
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    decoder = Decoder(stage, [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)], decode, prefill)
    decoder.read(sources)
    ends = [stop_id] * len(prompts) if stop_id is None or isinstance(stop_id, int) else list(stop_id)
    choose = _greedy if sampling.greedy else Sampler(sampling, prompts).choose
    following: dict[int, int] = {}
    if prefill_chunk is None:
        hidden = decoder.prefill(prompts)
        following.update(enumerate(choose(stage, hidden, range(len(prompts)))))
    else:
        for start in _together(range(0, max(map(len, prompts)), prefill_chunk), decoder):
            parts = [prompt[start : start + prefill_chunk] for prompt in prompts]
            done = [d for d, prompt in enumerate(prompts) if start < len(prompt) <= start + prefill_chunk]
            following.update(zip(done, _after(decoder, parts, done, choose), strict=True))
    results: list[list[int]] = [[] for _ in prompts]

    def steps() -> Iterator[list[int]]:
        """The documents that go on, step after step."""
        active = list(range(len(prompts)))
        while True:
            active = [d for d in active if following[d] != ends[d] and len(results[d]) < most[d]]
            for d in active:
                results[d].append(following[d])
            active = [d for d in active if len(results[d]) < most[d] and not (stop and stop(d, results[d]))]
            if not active:
                return
            yield active

    for active in _together(steps(), decoder):
        tokens = [[following[d]] if d in active else [] for d in range(len(prompts))]
        following.update(zip(active, _after(decoder, tokens, active, choose), strict=True))
    return results


def _together(steps: Iterable[T], decoder: Decoder) -> Iterator[T]:
    """`steps`; where other ranks' experts take part in a step, idle ones too until nobody has any left."""
    mesh, nothing = decoder.mesh, object()
    shared = mesh["ep"].size > 1
    mine = iter(steps)
    while True:
        step = next(mine, nothing)
        if shared:
            anyone = torch.tensor([int(step is not nothing)], device=decoder.device)
            if not all_reduce(anyone, mesh, "ep", op="max").item():
                return
        if step is not nothing:
            yield cast(T, step)
        elif shared:
            decoder.idle()
        else:
            return


def _greedy(stage: Stage, hidden_NH: torch.Tensor | None, documents: Sequence[int]) -> list[int]:
    return stage.best_tokens(hidden_NH, len(documents))


def _after(decoder: Decoder, tokens: Sequence[Sequence[int]], documents: Sequence[int], choose: Choose) -> list[int]:
    """Feed `tokens` and choose what follows in some of the `documents`."""
    hidden = decoder.step(tokens)
    ends = list(accumulate(len(ids) for ids in tokens))
    rows = None if hidden is None else hidden[[ends[document] - 1 for document in documents]]
    return choose(decoder.stage, rows, documents)
