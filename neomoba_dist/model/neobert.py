"""NeoBERT-MoBA: the layer list, and the whole model for one pipeline stage.

NeoBERT (arXiv 2502.19587): RMSNorm before each layer, SwiGLU, RoPE, unless the config chooses otherwise; here with GQA
and, by default, with MoBA in all but the last `hybrid_layer_count` layers (arXiv 2502.13189, section 3.2). Objective
"mlm" is a bidirectional encoder, "clm" a causal decoder. The same layers, in the same order, make the flat model
(`NeoBERT`) and the pipeline (parallel/pipeline.py).

Shape letters: T tokens, S tokens of this rank (T / tp under sequence parallelism), H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.config.text_tasks import HeadConfig
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.block import BLOCKS, Block, State
from neomoba_dist.model.cross_entropy import EAGER, ChunkFunctions, OutputMatrix, vocab_parallel_cross_entropy
from neomoba_dist.model.dropout import EmbeddingDropout, draws_of_tokens
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.norm import EmbeddingNorm, residual_norm
from neomoba_dist.model.positions import PositionEmbedding
from neomoba_dist.model.prediction_head import PredictionHead
from neomoba_dist.model.segments import NextSentence, SegmentEmbedding, next_sentence_sums
from neomoba_dist.model.text_heads import TEXT_HEADS, TextHead
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.tensor import enter_tensor_parallel, sum_over_tensor_parallel

IGNORE_INDEX = -100
VOCAB_MULTIPLE = 128  # rows per tp rank: whole tensor-core tiles


class Tokens(Protocol):
    """Packed tokens, as a data.Batch has them."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def cu_seqlens(self) -> torch.Tensor: ...


class Inputs(Tokens, Protocol):
    """What the model reads of a data.Batch."""

    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def row_ids(self) -> torch.Tensor: ...
    @property
    def counted(self) -> torch.Tensor | None: ...
    @property
    def encoder(self) -> Tokens | None: ...
    @property
    def token_type_ids(self) -> torch.Tensor | None: ...
    @property
    def next_sentence_labels(self) -> torch.Tensor | None: ...
    @property
    def pairs(self) -> torch.Tensor | None: ...


def _vocabulary_matrix(name: str, config: ModelConfig, init: Initializer) -> nn.Parameter:
    """[V, H], rows split over tp and padded with zeros to whole tiles."""
    return init.weight(name, (config.vocab_size, config.hidden_size), shard_dim=0, padded=_padded(config, init))


def _padded(config: ModelConfig, init: Initializer) -> int:
    multiple = VOCAB_MULTIPLE * init.mesh["tp"].size
    return -(-config.vocab_size // multiple) * multiple


class Embedding(nn.Module):
    """Token embedding: int64 [T] and the rest of a State -> State. Its single weight may be tied to the head's."""

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.mesh = init.mesh
        self.weight = _vocabulary_matrix("embedding.weight", config, init)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackedTokens]) -> State:
        input_ids, position_ids, cu_seqlens, packed = inputs
        shard = shard_of(self.weight)
        local = input_ids - shard.start[0]
        owned = (local >= 0) & (local < shard.extent[0])
        x_TH = F.embedding(local.where(owned, 0), self.weight) * owned[:, None]
        # a leaf that needs a gradient: pipeline stages send one back for every float tensor of the state
        exact = torch.promote_types(x_TH.dtype, torch.float32)
        aux_loss = torch.zeros((), dtype=exact, device=x_TH.device, requires_grad=x_TH.requires_grad)
        return sum_over_tensor_parallel(x_TH, self.mesh), aux_loss, position_ids, cu_seqlens, packed


class FinalNorm(nn.Module):
    """The norm after the last block, none where blocks end with their own: State -> State."""

    def __init__(self, config: ModelConfig, init: Initializer, name: str = "final_norm") -> None:
        super().__init__()
        is_last_norm = config.norm_placement == "pre"
        self.norm = residual_norm(name, config, init) if is_last_norm else nn.Identity()

    def forward(self, state: State) -> State:
        hidden, *rest = state
        return self.norm(hidden), *rest


class Head(nn.Module):
    """Output matrix [V, H]; with `prediction_head` also what stands before it, and biases that start at zero.

    Losses are computed inside `forward`, where ZeRO-3 has the weights gathered. tied: the embedding's weight, where it
    lies on this rank.
    """

    def __init__(self, config: ModelConfig, init: Initializer, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.mesh = init.mesh
        name = "embedding.weight" if config.tie_word_embeddings else "head.weight"
        self.weight = tied if tied is not None else _vocabulary_matrix(name, config, init)
        self.chunk_functions = EAGER
        self.transform: nn.Module = nn.Identity()
        self.bias: nn.Parameter | None = None
        if config.prediction_head:
            self.transform = PredictionHead(config, init)
            size = (config.vocab_size,)
            self.bias = init.weight("head.bias", size, shard_dim=0, scale=0.0, padded=_padded(config, init))

    @property
    def output(self) -> OutputMatrix:
        """What `transform`ed hidden states are multiplied with."""
        return OutputMatrix(self.weight, self.bias)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of a few tokens, [N, v], those of padding rows among them."""
        return F.linear(self.transform(hidden_NH), *self.output)

    def forward(self, state: State, labels_T: torch.Tensor, counted_C: torch.Tensor | None = None) -> torch.Tensor:
        hidden_SH = self.transform(state[0])
        return token_losses(hidden_SH, self.output, labels_T, self.mesh, counted_C, self.chunk_functions)


class PipelineHead(Head):
    """The head as a pipeline layer: DeepSpeed gives the labels to its loss function, so the weights go there too."""

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:  # type: ignore[override]
        """Hidden, auxiliary loss, OutputMatrix; then what a head before this one made, behind the State."""
        return self.transform(state[0]), state[1], self.output, *state[5:]


def token_losses(
    hidden_SH: torch.Tensor,
    output: OutputMatrix,
    labels_T: torch.Tensor,
    mesh: Mesh,
    counted_C: torch.Tensor | None = None,
    functions: ChunkFunctions = EAGER,
) -> torch.Tensor:
    """Cross entropy of every token, [T] float32 (float64 for float64), 0 where the label is -100.

    counted_C: int64, the tokens that enter the vocabulary product, no one twice: those whose label counts, and maybe
    others (`Batch.with_counted`). With MLM at 20 % that saves four fifths of it. None: looked up, for which the host
    waits for the device.
    """
    hidden_TH = enter_tensor_parallel(hidden_SH, mesh)
    if counted_C is None:
        counted_C = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    labels_C = labels_T.index_select(0, counted_C)
    hidden_CH, target_C = hidden_TH.index_select(0, counted_C), labels_C.clamp(min=0)
    losses_C = vocab_parallel_cross_entropy(hidden_CH, output.weight, target_C, mesh, functions, output.bias)
    losses_C = losses_C.where(labels_C != IGNORE_INDEX, 0)
    return losses_C.new_zeros(len(labels_T)).index_put((counted_C,), losses_C)


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list: the class and its arguments, so that a pipeline builds only its own stage.

    tied: layers with the same key share the parameter "weight".
    """

    cls: type[nn.Module]
    kwargs: Mapping[str, Any]
    tied: str | None = None


def layer_list(
    config: ModelConfig,
    init: Initializer,
    *,
    recompute: str = "none",
    recompute_every: int = 1,
    row_length: int | None = None,
    text_head: HeadConfig | None = None,
) -> list[Layer]:
    """Embedding; added positions, segments, norm and dropout if any; blocks, final norm, head for pairs if any, head:
    the order in which `State` travels."""
    common = {"config": config, "init": init}
    tied = "embedding" if config.tie_word_embeddings and not text_head else None
    head = Layer(PipelineHead, common, tied)
    if text_head:
        head = Layer(TEXT_HEADS[text_head.kind], {**common, "head": text_head})
    added = config.position_embedding in ("learned", "sinusoidal")
    blocks = [
        Layer(
            BLOCKS[config.norm_placement],
            {
                **common,
                "index": i,
                "attention": kind,
                "recompute": recompute_of(i, recompute, recompute_every),
                "row_length": row_length,
            },
        )
        for i, kind in enumerate(config.layer_attentions)
    ]
    return [
        Layer(Embedding, common, tied),
        *([Layer(PositionEmbedding, common)] if added else []),
        *([Layer(SegmentEmbedding, common)] if config.type_vocab_size else []),
        *([Layer(EmbeddingNorm, common)] if config.embedding_norm else []),
        *([Layer(EmbeddingDropout, {"config": config})] if config.dropout else []),
        *blocks,
        Layer(FinalNorm, common),
        *([Layer(NextSentence, common)] if config.next_sentence_prediction and not text_head else []),
        head,
    ]


def recompute_of(index: int, recompute: str, every: int) -> str:
    """What block `index` recomputes: "full" may be for every so many blocks only (config.PhaseConfig)."""
    return "none" if recompute == "full" and index % every else recompute


class NeoBERT(nn.Module):
    """The whole model in one pipeline stage, on the mesh's device.

    seed: of the initial weights. recompute, recompute_every: activation checkpointing (config.PhaseConfig).
    row_length: tokens of a training row; None: a micro-batch is one row. text_head: on whole texts, instead of the
    output matrix. deferred: weights come later (init.Initializer).
    """

    head_class = Head

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        recompute_every: int = 1,
        row_length: int | None = None,
        text_head: HeadConfig | None = None,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.seed, self.step, self.row_length = seed, 0, row_length  # of dropout
        init = Initializer(mesh, seed, config.initializer_range, dtype, deferred)
        *body, head = layer_list(
            config,
            init,
            recompute=recompute,
            recompute_every=recompute_every,
            row_length=row_length,
            text_head=text_head,
        )
        embedding, *blocks = (layer.cls(**layer.kwargs) for layer in body)
        assert isinstance(embedding, Embedding)
        self.embedding = embedding
        self.next_sentence = blocks.pop() if isinstance(blocks[-1], NextSentence) else None
        self.final_norm = blocks.pop()
        self.positions = blocks.pop(0) if isinstance(blocks[0], PositionEmbedding) else None
        self.segments = blocks.pop(0) if isinstance(blocks[0], SegmentEmbedding) else None
        self.embedding_norm = blocks.pop(0) if isinstance(blocks[0], EmbeddingNorm) else None
        self.dropout: EmbeddingDropout | None = None
        if isinstance(dropout := blocks[0], EmbeddingDropout):
            self.dropout = dropout
            del blocks[0]
        self.blocks = nn.ModuleList(blocks)
        self.run_block: Callable[[Block, State], State] = lambda block, state: block(state)  # or train.graphs
        self.head: Head | TextHead
        if text_head:
            self.head = head.cls(**head.kwargs)  # type: ignore[assignment]
        else:
            self.head = self.head_class(config, init, tied=embedding.weight if config.tie_word_embeddings else None)

    def block_states(self, batch: Inputs) -> Iterator[State]:
        """The state after every block, first to last."""
        of_pairs = (batch.token_type_ids, batch.pairs)
        state = self.first_state(batch, batch.row_ids, self.row_length, self.config, self.dropout, of_pairs)
        for block in self.blocks:
            state = self.run_block(cast(Block, block), state)
            yield state

    def first_state(
        self,
        tokens: Tokens,
        row_ids: torch.Tensor,
        row_length: int | None,
        config: ModelConfig,
        dropout: EmbeddingDropout | None,
        of_pairs: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> State:
        """What the first block of the layers of `config` takes. of_pairs: token types and `Batch.pairs`."""
        places = (tokens.position_ids, tokens.cu_seqlens)
        draws = None
        if dropout is not None and self.training:
            key, count = (self.seed, self.step), len(tokens.input_ids)
            draws = draws_of_tokens(row_ids, count, row_length, config, self.mesh, key)
        packed = PackedTokens.of(*places, config, self.mesh, self.embedding.weight.dtype, draws)
        packed = packed._replace(token_types=of_pairs[0], pairs=of_pairs[1])
        state = self.embedding((tokens.input_ids, *places, packed))
        if self.positions is not None:
            state = self.positions(state)
        if self.segments is not None:
            state = self.segments(state)
        if self.embedding_norm is not None:
            state = self.embedding_norm(state)
        return state if dropout is None else dropout(state)

    def states(self, batch: Inputs) -> State:
        """The state after the final norm: hidden [S, H] and the sum of auxiliary losses."""
        for state in self.block_states(batch):
            last = state
        return self.final_norm(last)

    def hidden_states(self, batch: Inputs) -> torch.Tensor:
        """Final hidden states [S, H]."""
        return self.states(batch)[0]

    def token_losses(self, batch: Inputs) -> torch.Tensor:
        """Cross entropy per token, [T], 0 where the label is -100."""
        return self._losses(self.states(batch), batch)

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] on a mesh of ones, for decoding and evaluation of few tokens; training never forms them."""
        assert isinstance(self.head, Head)
        return self.head.logits(hidden_SH)[:, : self.config.vocab_size]

    def forward(self, batch: Inputs, outputs: bool = False) -> Any:
        """(sum of the losses, auxiliary loss), both scalars; with `outputs` a text head's outputs [D, K] instead.

        With a head for pairs and a batch of them the first is [3]: of the losses of tokens and of pairs, and how many
        pairs are told right. One door for all, because ZeRO-3 gathers weights for `forward` alone.
        """
        state = self.states(batch)
        if outputs:
            return self.head(state)
        sums = self._losses(state, batch).sum()
        if self.next_sentence is not None and batch.pairs is not None:
            assert batch.next_sentence_labels is not None
            *state, logits = self.next_sentence(state)
            of_pairs = next_sentence_sums(logits, batch.next_sentence_labels.index_select(0, batch.pairs))
            sums = torch.cat((sums[None], of_pairs))
        return sums, state[1]

    def _losses(self, state: State, batch: Inputs) -> torch.Tensor:
        """Of tokens [T], or of what a text head has losses of."""
        if isinstance(self.head, Head):
            return self.head(state, batch.labels, batch.counted)
        return self.head(state, batch.labels)
