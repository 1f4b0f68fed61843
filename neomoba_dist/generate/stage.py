"""The layers of one pipeline stage, for decoding; on a mesh without pipeline parallelism the whole model.

Training's pipeline belongs to DeepSpeed; decoding needs neither its schedule nor its engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, Self

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.config.text_tasks import HeadConfig
from neomoba_dist.data.batch import IGNORE_LABEL, Batch
from neomoba_dist.errors import UserError
from neomoba_dist.model.attention.cache import LayerCache
from neomoba_dist.model.attention.packed import Memory, PackedTokens
from neomoba_dist.model.block import Block
from neomoba_dist.model.encoder_decoder import MODELS, EncoderDecoder
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.neobert import Embedding, FinalNorm, Head, NeoBERT, layer_list
from neomoba_dist.model.neobert import Tokens as PackedIds
from neomoba_dist.model.norm import EmbeddingNorm
from neomoba_dist.model.positions import PositionEmbedding
from neomoba_dist.model.segments import NextSentence, SegmentEmbedding
from neomoba_dist.model.text_heads import TextHead
from neomoba_dist.parallel.comm import all_reduce, broadcast, receive, send
from neomoba_dist.parallel.context_split import ContextSplit
from neomoba_dist.parallel.documents import check_cu_seqlens
from neomoba_dist.parallel.mesh import Mesh


class GenerationError(UserError):
    """A model, layout or prompt that cannot be decoded; the message is one line."""


class Tokens(PackedIds, Protocol):
    """What the layers read of a Batch without labels."""

    @property
    def token_type_ids(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Texts:
    """New tokens of some documents; see data.Batch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    token_type_ids: torch.Tensor | None = None


def batch_of(
    documents: Sequence[Sequence[int]], device: torch.device | str, token_types: Sequence[Sequence[int]] | None = None
) -> Batch:
    """Documents end to end as one Batch on `device`, without labels. token_types: of their tokens, where they are pairs
    of texts."""
    input_ids = torch.tensor([token for ids in documents for token in ids], dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *accumulate(len(ids) for ids in documents)], dtype=torch.int32)
    check_cu_seqlens(cu_seqlens, len(input_ids))
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_LABEL),
        position_ids=torch.cat([torch.arange(len(ids)) for ids in documents]),
        cu_seqlens=cu_seqlens,
        row_ids=torch.arange(len(documents)),
        num_valid=0,
        token_type_ids=None if token_types is None else torch.tensor([kind for of in token_types for kind in of]),
    ).to(device)


def rows_at(hidden_SH: torch.Tensor, positions: torch.Tensor, mesh: Mesh, split: ContextSplit) -> torch.Tensor:
    """Rows of the whole batch's hidden states at global `positions`, int64 [n], on every cp rank: [n, H]."""
    rank, local = split.owners_of(positions)
    mine = rank == mesh["cp"].index
    found = hidden_SH.new_zeros(len(positions), hidden_SH.shape[1])
    found[mine] = hidden_SH[local[mine]]
    return all_reduce(found, mesh, "cp")


class Stage(nn.Module):
    """Blocks first..last of the model; the first stage has the embedding too, the last one the final norm and the head.

    `kinds`: attention of its blocks. encoder: of an encoder-decoder, whose decoder this is then; `config` too.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        layers: list[nn.Module],
        first_block: int,
        encoder: "Stage | None" = None,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.encoder = config, mesh, encoder
        self.layers = nn.ModuleList(layers)
        self.blocks = [layer for layer in layers if isinstance(layer, Block)]
        self.kinds = config.layer_attentions[first_block : first_block + len(self.blocks)]

    @classmethod
    def of(cls, model: NeoBERT) -> Self:
        """The whole model as the only stage."""
        added = [layer for layer in (model.positions, model.segments, model.embedding_norm) if layer is not None]
        layers = [model.embedding, *added, *model.blocks, model.final_norm, model.head]
        if not isinstance(model, EncoderDecoder):
            return cls(model.config, model.mesh, layers, 0)
        encoder = cls(model.config.encoder, model.mesh, layers, 0)
        layers = [model.embedding, *added, *model.decoder_blocks, model.decoder_norm, model.head]
        return cls(model.config.decoder, model.mesh, layers, 0, encoder)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        text_head: HeadConfig | None = None,
    ) -> Self:
        """This rank's stage with fresh weights; blocks are spread evenly over pp. text_head: of a fine-tuned model."""
        pp = mesh["pp"]
        if pp.size == 1:
            return cls.of(MODELS[config.objective](config, mesh, seed=seed, dtype=dtype, text_head=text_head))
        layers = layer_list(config, Initializer(mesh, seed, config.initializer_range, dtype), text_head=text_head)
        layers = [layer for layer in layers if layer.cls is not NextSentence]
        blocks = [i for i, layer in enumerate(layers) if issubclass(layer.cls, Block)]
        first, stop = (len(blocks) * index // pp.size for index in (pp.index, pp.index + 1))
        start = 0 if pp.index == 0 else blocks[first]
        end = len(layers) if pp.index == pp.size - 1 else blocks[stop]
        return cls(config, mesh, [layer.cls(**layer.kwargs) for layer in layers[start:end]], first)

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.mesh["pp"].index == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens are chosen here."""
        return self.mesh["pp"].index == self.mesh["pp"].size - 1

    @property
    def embedding(self) -> Embedding:
        """First stage only."""
        layer = self.layers[0]
        assert isinstance(layer, Embedding)
        return layer

    @property
    def added(self) -> list[nn.Module]:
        """Positions and segments added to the embedding, and its norm, if any; first stage only."""
        kinds = PositionEmbedding | SegmentEmbedding | EmbeddingNorm
        return [layer for layer in self.layers if isinstance(layer, kinds)]

    @property
    def final_norm(self) -> FinalNorm:
        """Last stage only."""
        layer = self.layers[-2]
        assert isinstance(layer, FinalNorm)
        return layer

    @property
    def head(self) -> Head:
        """Last stage only."""
        layer = self.layers[-1]
        if isinstance(layer, TextHead):
            raise GenerationError("the checkpoint is fine-tuned on whole texts and predicts no tokens; use another one")
        assert isinstance(layer, Head)
        return layer

    @property
    def output_matrix(self) -> nn.Parameter:
        """Vocabulary rows of this rank, [v, H]; last stage only."""
        return self.head.weight

    @property
    def text_head(self) -> TextHead | None:
        """A fine-tuned model's, on the last stage."""
        layer = self.layers[-1]
        return layer if isinstance(layer, TextHead) else None

    def read(self, texts: PackedIds | None) -> Memory | None:
        """What a decoder attends to: the final states of its encoder, which reads `texts`. None for a model of one."""
        if self.encoder is None or texts is None:
            return None
        states = self.encoder.run(Texts(texts.input_ids, texts.position_ids, texts.cu_seqlens))
        assert states is not None  # no pipeline has an encoder-decoder
        return Memory(states, texts.cu_seqlens)

    @torch.no_grad()
    def run(
        self, tokens: Tokens, caches: Sequence[LayerCache | None] | None = None, memory: Memory | None = None
    ) -> torch.Tensor | None:
        """The layers of all stages: the hidden states after the final norm, [S, H], on the last stage; else None.

        tokens: this rank's share, on its device. caches: of this stage's blocks, for decoding. memory: what a decoder
        attends to, see `read`.
        """
        mesh, pp = self.mesh, self.mesh["pp"]
        position_ids, cu_seqlens, weight = tokens.position_ids, tokens.cu_seqlens, next(self.parameters())
        if caches is None:
            packed = PackedTokens.of(position_ids, cu_seqlens, self.config, mesh, weight.dtype)
            packed = packed._replace(token_types=tokens.token_type_ids)
        else:
            packed = PackedTokens.of_step(position_ids, cu_seqlens, self.config, weight.dtype)
        packed = packed._replace(memory=memory)
        if self.is_first:
            state = self.embedding((tokens.input_ids, position_ids, cu_seqlens, packed))
            for layer in self.added:
                state = layer(state)
            hidden = state[0]
        else:
            hidden = weight.new_empty(len(tokens.input_ids), self.config.hidden_size)
            receive(hidden, mesh, "pp", source=pp.index - 1)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            hidden, *_ = block.transform(hidden, position_ids, packed, cache)
        if self.is_last:
            return self.final_norm.norm(hidden)
        send(hidden, mesh, "pp", target=pp.index + 1)
        return None

    @torch.no_grad()
    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits, [N, v]; -inf where a column is padding. Last stage only."""
        weight = self.output_matrix
        logits = self.head.logits(hidden_NH).to(torch.promote_types(hidden_NH.dtype, torch.float32))
        valid = shard_of(weight).valid(weight).shape[0]
        logits[:, valid:] = -torch.inf
        return logits

    @torch.no_grad()
    def whole_logits(self, hidden_NH: torch.Tensor | None, documents: int) -> torch.Tensor:
        """Logits of the whole vocabulary, float32 [N, V] on the CPU, on every rank.

        hidden_NH: of each of `documents` texts, on the last stage. For the few rows of a decoding step only.
        """
        parameter = next(self.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        logits_NV = torch.zeros(documents, self.config.vocab_size, dtype=dtype, device=parameter.device)
        if hidden_NH is not None:
            shard = shard_of(self.output_matrix)
            first, length = shard.start[0], shard.extent[0]
            logits_NV[:, first : first + length] = self.logits(hidden_NH)[:, :length]
            logits_NV = all_reduce(logits_NV, self.mesh, "tp")  # zeros elsewhere: each column has one owner
        broadcast(logits_NV, self.mesh, "pp", source=self.mesh["pp"].size - 1)
        if not logits_NV.isfinite().all():
            raise GenerationError("the model's logits are not numbers; its weights are damaged")
        return logits_NV.cpu()

    @torch.no_grad()
    def best_tokens(self, hidden_NH: torch.Tensor | None, documents: int) -> list[int]:
        """The likeliest next token of each of `documents` hidden states, on every rank; of equals the lowest id.

        hidden_NH: on the last stage. The vocabulary's shards agree by two numbers per token, not by their logits.
        """
        device = next(self.parameters()).device
        best = torch.zeros(documents, dtype=torch.int64, device=device)
        if hidden_NH is not None:
            logits, weight = self.logits(hidden_NH), self.output_matrix
            offset = shard_of(weight).start[0]
            ids = torch.arange(offset, offset + logits.shape[1], device=device)
            nowhere = torch.iinfo(torch.int64).max
            largest = all_reduce(logits.amax(-1), self.mesh, "tp", op="max")
            found = torch.where(logits == largest[:, None], ids, nowhere).amin(-1)
            best = all_reduce(found, self.mesh, "tp", op="min")
        broadcast(best, self.mesh, "pp", source=self.mesh["pp"].size - 1)
        chosen = best.tolist()
        if any(token >= self.config.vocab_size for token in chosen):
            raise GenerationError("the model's logits are not numbers; its weights are damaged")
        return chosen
