"""One transformer block. Between layers travels a `State`, the same for one process and for a pipeline."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.cache import LayerCache
from neomoba_dist.model.attention.layer import Attention
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.dropout import Dropout
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.mlp import MLP, MLPS
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.model.norm import residual_norm

# hidden [S, H], aux_loss [] (at least float32), position_ids int64 [T], cu_seqlens int32 [max_documents + 1], and what
# follows from the last two. Fixed shapes, because pipeline stages allocate their receive buffers once; only the four
# tensors go to the next stage, which makes its own PackedTokens.
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PackedTokens]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): norms before what they norm for (arXiv 2002.04745).

    attention: its kind (ModelConfig.layer_attentions). recompute: "full" keeps only the block's input for the backward
    pass, "selective" recomputes the attention core. row_length: tokens of a training row, which bounds the
    documents and which mixtures of experts balance; None: a micro-batch is one row.
    """

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        init: Initializer,
        *,
        attention: str = "moba",
        recompute: str = "none",
        row_length: int | None = None,
    ) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.index, self.recompute = index, recompute
        self.attention_norm: nn.Module = nn.Identity()
        if config.has_attention_norm(index):
            self.attention_norm = residual_norm(f"{name}.attention_norm", config, init)
        self.attention = Attention(
            f"{name}.attention",
            config,
            init,
            kind=attention,
            recompute_core=recompute == "selective",
            row_length=row_length,
        )
        self.mlp_norm = residual_norm(f"{name}.mlp_norm", config, init)
        self.mlp: MLP | MoE
        if index in config.moe_layers:
            self.mlp = MoE(f"{name}.mlp", index, config, init, row_length=row_length)
        else:
            self.mlp = MLPS[config.mlp_activation](f"{name}.mlp", config, init)
        self.attention_dropout = Dropout(f"{name}.attention", config.dropout)
        self.mlp_dropout = Dropout(f"{name}.mlp", config.dropout)
        # in training called once per pass, recomputed or not, with the output [S, H] and a mixture's record
        self.observe: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None

    def forward(self, state: State) -> State:
        hidden, aux_loss, position_ids, cu_seqlens, packed = state
        if self.recompute == "full" and torch.is_grad_enabled():
            hidden, added, record = checkpoint(
                self.transform, hidden, position_ids, packed, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden, added, record = self.transform(hidden, position_ids, packed)
        if added is not None:
            aux_loss = aux_loss + added
        if self.observe is not None and self.training:
            self.observe(hidden.detach(), record)
        return hidden, aux_loss, position_ids, cu_seqlens, packed

    def transform(
        self,
        x_SH: torch.Tensor,
        position_ids: torch.Tensor,
        packed: PackedTokens,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The block proper: [S, H] -> [S, H], and a mixture's auxiliary loss and record. cache: for decoding."""
        x_SH = self.attend(x_SH, packed, cache)
        output_SH, aux_loss, record = self.feed_forward(self.mlp_norm(x_SH), position_ids)
        return x_SH + self.mlp_dropout(output_SH, packed.draws), aux_loss, record

    def attend(self, x_SH: torch.Tensor, packed: PackedTokens, cache: LayerCache | None) -> torch.Tensor:
        """The part of the block before the feed-forward layer: [S, H] -> [S, H]."""
        output_SH = self.attention(self.attention_norm(x_SH), packed, cache)
        return x_SH + self.attention_dropout(output_SH, packed.draws)

    def feed_forward(
        self, x_SH: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The second layer of the block, dense or a mixture, with a mixture's auxiliary loss and record."""
        if isinstance(self.mlp, MoE):
            return self.mlp(x_SH, position_ids)
        return self.mlp(x_SH), None, None


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x)), as in the first transformer (arXiv 1706.03762) and BERT."""

    def transform(
        self,
        x_SH: torch.Tensor,
        position_ids: torch.Tensor,
        packed: PackedTokens,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        x_SH = self.attend(x_SH, packed, cache)
        output_SH, aux_loss, record = self.feed_forward(x_SH, position_ids)
        return self.mlp_norm(x_SH + self.mlp_dropout(output_SH, packed.draws)), aux_loss, record

    def attend(self, x_SH: torch.Tensor, packed: PackedTokens, cache: LayerCache | None) -> torch.Tensor:
        output_SH = self.attention(x_SH, packed, cache)
        return self.attention_norm(x_SH + self.attention_dropout(output_SH, packed.draws))


BLOCKS: dict[str, type[Block]] = {"pre": Block, "post": PostNormBlock}  # by norm_placement
