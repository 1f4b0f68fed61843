"""Greedy decoding of a batch of prompts of different lengths, on tensor-, context- and pipeline-parallel models.

Prompts are fed in chunks, then one token per document and step. All tokens of a step are packed, with the borders of
their documents in cu_seqlens, as in training. MoBA layers decode with full attention, as the paper's authors do
(arXiv 2502.13189, section 3.3), or with MoBA, choosing the blocks that a pass over the whole text would choose.

Shape letters: T new tokens of all documents, N documents, H hidden size, v vocabulary rows of this rank.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from neomoba_dist.generate.stage import Stage
from neomoba_dist.model.attention.cache import KVCache
from neomoba_dist.model.attention.context.cache import ShardedKVCache
from neomoba_dist.model.init import shard_of
from neomoba_dist.parallel.comm import all_reduce, broadcast, receive, send
from neomoba_dist.parallel.documents import check_cu_seqlens

DECODES = ("full", "moba")


class GenerationError(ValueError):
    """A model, layout or prompt that cannot be decoded; the message is one line."""


class Decoder:
    """One rank's part of decoding. All ranks of a model call the same methods with the same tokens.

    capacities: most tokens of every document, prompt included. decode: "full" or "moba", what MoBA layers run; full and
    sliding-window layers stay what they are. Raises GenerationError where the model or the layout cannot be decoded.
    """

    def __init__(self, stage: Stage, capacities: Sequence[int], decode: str = "full") -> None:
        config = stage.config
        if not config.causal:
            raise GenerationError(
                'generation needs a causal model: neomoba.model.objective is "mlm", train one with "clm"'
            )
        if decode not in DECODES:
            raise GenerationError(f"decode must be one of {', '.join(DECODES)}, got {decode!r}")
        if stage.mesh.sequence_parallel:
            raise GenerationError("decoding needs a mesh without sequence parallelism; set sequence_parallel to false")
        if config.position_embedding == "learned" and max(capacities) > config.max_position_embeddings:
            raise GenerationError(
                f"{max(capacities)} tokens are more than the {config.max_position_embeddings} positions that the model "
                "learned (neomoba.model.max_position_embeddings); ask for fewer"
            )
        self.stage, self.mesh = stage.eval(), stage.mesh  # experts have a capacity in training only
        weight = next(stage.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        kinds = ["full" if kind == "moba" and decode == "full" else kind for kind in stage.kinds]
        num_kv_heads = stage.blocks[0].attention.num_kv_heads
        self.cache: KVCache
        if self.mesh["cp"].size > 1:
            self.cache = ShardedKVCache(config, kinds, num_kv_heads, capacities, self.dtype, self.mesh)
        else:
            self.cache = KVCache(config, kinds, num_kv_heads, capacities, self.dtype, self.device)

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
        stage, mesh, pp = self.stage, self.mesh, self.mesh["pp"]
        if stage.is_first:
            input_ids = torch.tensor([i for ids in tokens for i in ids], dtype=torch.int64, device=self.device)
            state = stage.embedding((input_ids, position_ids, cu_seqlens))
            hidden = state[0] if stage.positions is None else stage.positions(state)[0]
        else:
            hidden = torch.empty(sum(counts), stage.config.hidden_size, dtype=self.dtype, device=self.device)
            receive(hidden, mesh, "pp", source=pp.index - 1)
        for block, cache in zip(stage.blocks, self.cache.layers, strict=True):
            hidden, *_ = block.transform(hidden, position_ids, cu_seqlens, cache)
        if stage.is_last:
            return stage.final_norm.norm(hidden)
        send(hidden, mesh, "pp", target=pp.index + 1)
        return None

    @torch.no_grad()
    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits, [N, v]; -inf where a column is padding. Last stage only."""
        weight = self.stage.output_matrix
        logits = F.linear(hidden_NH, weight).to(torch.promote_types(self.dtype, torch.float32))
        valid = shard_of(weight).valid(weight).shape[0]
        logits[:, valid:] = -torch.inf
        return logits

    @torch.no_grad()
    def best_tokens(self, hidden_NH: torch.Tensor | None, documents: int) -> list[int]:
        """The likeliest next token of each of `documents` hidden states, on every rank; of equals the lowest id.

        hidden_NH: on the last stage. The vocabulary's shards agree by two numbers per token, not by their logits.
        """
        best = torch.zeros(documents, dtype=torch.int64, device=self.device)
        if hidden_NH is not None:
            logits, weight = self.logits(hidden_NH), self.stage.output_matrix
            offset = shard_of(weight).start[0]
            ids = torch.arange(offset, offset + logits.shape[1], device=self.device)
            nowhere = torch.iinfo(torch.int64).max
            largest = all_reduce(logits.amax(-1), self.mesh, "tp", op="max")
            found = torch.where(logits == largest[:, None], ids, nowhere).amin(-1)
            best = all_reduce(found, self.mesh, "tp", op="min")
        broadcast(best, self.mesh, "pp", source=self.mesh["pp"].size - 1)
        chosen = best.tolist()
        if any(token >= self.stage.config.vocab_size for token in chosen):
            raise GenerationError("the model's logits are not numbers; its weights are damaged")
        return chosen


def generate(
    stage: Stage,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    decode: str = "full",
    prefill_chunk: int | None = None,
    stop_id: int | None = None,
) -> list[list[int]]:
    """The greedy continuation of every prompt, up to `max_new_tokens` ids and without `stop_id`, which ends it.

    prefill_chunk: most tokens of one prompt that are fed at a time; None: all. Raises GenerationError, see `Decoder`.
    """
    if not prompts or not all(prompts):
        raise GenerationError("a prompt is empty; give every document at least one token")
    decoder = Decoder(stage, [len(prompt) + max_new_tokens for prompt in prompts], decode)
    longest = max(len(prompt) for prompt in prompts)
    chunk = prefill_chunk or longest
    following: dict[int, int] = {}
    for start in range(0, longest, chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        done = [d for d, prompt in enumerate(prompts) if start < len(prompt) <= start + chunk]
        following.update(zip(done, _after(decoder, parts, done), strict=True))
    results: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for step in range(max_new_tokens):
        active = [document for document in active if following[document] != stop_id]
        for document in active:
            results[document].append(following[document])
        if not active or step == max_new_tokens - 1:
            break
        tokens = [[following[d]] if d in active else [] for d in range(len(prompts))]
        following = dict(zip(active, _after(decoder, tokens, active), strict=True))
    return results


def _after(decoder: Decoder, tokens: Sequence[Sequence[int]], documents: Sequence[int]) -> list[int]:
    """Feed `tokens` and choose what follows in some of the `documents`."""
    hidden = decoder.step(tokens)
    ends = list(accumulate(len(ids) for ids in tokens))
    rows = None if hidden is None else hidden[[ends[document] - 1 for document in documents]]
    return decoder.best_tokens(rows, len(documents))
