"""Encoder-decoders (arXiv 1706.03762; T5, arXiv 1910.10683): an encoder of NeoBERT's layers, and a causal decoder that
attends to its final states. Embedding, added positions and head are shared by both.

The decoder's layers are numbered on after the encoder's: "blocks.3" is the first one of a decoder after three layers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.cache import LayerCache
from neomoba_dist.model.attention.cross import CrossAttention
from neomoba_dist.model.attention.packed import Memory, PackedTokens
from neomoba_dist.model.block import Block, PostNormBlock, State
from neomoba_dist.model.dropout import Dropout, EmbeddingDropout
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.neobert import FinalNorm, Inputs, NeoBERT, recompute_of
from neomoba_dist.model.norm import residual_norm
from neomoba_dist.parallel.mesh import Mesh


class DecoderBlock(Block):
    """A block with cross attention between its two layers: x + attention(norm(x)), x + cross_attention(norm(x)), then
    x + mlp(norm(x)). Arguments as for Block; row_length: of the encoder's rows, if they are longer."""

    def __init__(self, index: int, config: ModelConfig, init: Initializer, **settings: Any) -> None:
        super().__init__(index, config, init, **settings)
        name = f"blocks.{index}"
        self.cross_norm = residual_norm(f"{name}.cross_norm", config, init)
        self.cross_attention = CrossAttention(
            f"{name}.cross_attention",
            config,
            init,
            recompute_core=self.recompute == "selective",
            row_length=settings.get("row_length"),
        )
        self.cross_dropout = Dropout(f"{name}.cross_attention", config.dropout)

    def cross(self, x_SH: torch.Tensor, packed: PackedTokens, cache: LayerCache | None) -> torch.Tensor:
        """Cross attention with its dropout: [S, H] -> [S, H]."""
        assert packed.memory is not None
        return self.cross_dropout(self.cross_attention(x_SH, packed.cu_seqlens, packed.memory, cache), packed.draws)

    def attend(self, x_SH: torch.Tensor, packed: PackedTokens, cache: LayerCache | None) -> torch.Tensor:
        x_SH = super().attend(x_SH, packed, cache)
        return x_SH + self.cross(self.cross_norm(x_SH), packed, cache)


class PostNormDecoderBlock(DecoderBlock, PostNormBlock):
    """The same with the norm after each sum, as in the first transformer."""

    def attend(self, x_SH: torch.Tensor, packed: PackedTokens, cache: LayerCache | None) -> torch.Tensor:
        x_SH = PostNormBlock.attend(self, x_SH, packed, cache)
        return self.cross_norm(x_SH + self.cross(x_SH, packed, cache))


DECODER_BLOCKS: dict[str, type[DecoderBlock]] = {"pre": DecoderBlock, "post": PostNormDecoderBlock}


class EncoderDecoder(NeoBERT):
    """The whole model in one process: a NeoBERT, which is the encoder with the head, and the decoder before that head.

    Arguments as for NeoBERT; row_length: tokens of the longest rows of either; those of a batch are told from it.
    """

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
        deferred: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            config.encoder,
            mesh,
            seed=seed,
            dtype=dtype,
            recompute=recompute,
            recompute_every=recompute_every,
            row_length=row_length,
            deferred=deferred,
            **settings,
        )
        self.config, decoder, first = config, config.decoder, config.num_hidden_layers
        init = Initializer(mesh, seed, config.initializer_range, dtype, deferred)
        self.decoder_dropout: EmbeddingDropout | None = None
        if config.dropout:
            self.decoder_dropout = EmbeddingDropout(decoder, "decoder_embedding")
        self.decoder_blocks = nn.ModuleList(
            DECODER_BLOCKS[config.norm_placement](
                first + i,
                decoder,
                init,
                attention=kind,
                recompute=recompute_of(first + i, recompute, recompute_every),
                row_length=row_length,
            )
            for i, kind in enumerate(decoder.layer_attentions)
        )
        self.decoder_norm = FinalNorm(decoder, init, "decoder_norm")

    def block_states(self, batch: Inputs) -> Iterator[State]:
        """The state after every block, the encoder's, then the decoder's."""
        tokens, rows = batch.encoder, len(batch.row_ids)
        assert tokens is not None, "a batch for an encoder-decoder has both sides"
        length = len(tokens.input_ids) // rows
        state = self.first_state(tokens, batch.row_ids, length, self.config.encoder, self.dropout)
        for block in self.blocks:
            state = block(state)
            yield state
        states_MH, aux_loss, *_ = self.final_norm(state)
        length = len(batch.input_ids) // rows
        first = self.first_state(batch, batch.row_ids, length, self.config.decoder, self.decoder_dropout)
        hidden, _, position_ids, cu_seqlens, packed = first
        packed = packed._replace(memory=Memory(states_MH, tokens.cu_seqlens))
        state = hidden, aux_loss, position_ids, cu_seqlens, packed
        for block in self.decoder_blocks:
            state = block(state)
            yield state

    def states(self, batch: Inputs) -> State:
        """The decoder's state after its final norm."""
        for state in self.block_states(batch):
            last = state
        return self.decoder_norm(last)


MODELS: dict[str, type[NeoBERT]] = {  # by objective
    "mlm": NeoBERT,
    "clm": NeoBERT,
    "span_corruption": EncoderDecoder,
}
