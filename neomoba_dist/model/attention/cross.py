"""Attention of a decoder to the final states of its encoder (arXiv 1706.03762, section 3.2.3), with grouped queries.

Every position of a document sees the whole document on the encoder's side; there are no positions in it, neither
rotary nor as biases, as in T5. It is always full attention: MoBA's blocks are those of the text that attends.

Shape letters: T tokens of the decoder, S of these on this rank (T / tp under sequence parallelism), E and M the same of
the encoder, H hidden size, N heads of this rank, D head size. Heads are split over tp as in layer.py.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.cache import LayerCache
from neomoba_dist.model.attention.kernels.cross import cross_attention
from neomoba_dist.model.attention.layer import rows_of_kv_head
from neomoba_dist.model.attention.packed import Memory
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.norm import RMSNorm
from neomoba_dist.parallel.tensor import column_linear, row_linear


class CrossAttention(nn.Module):
    """x [S, H] of the decoder and the encoder's states [M, H] -> [S, H].

    row_length: tokens of a row of either, at most; None: a document may fill the micro-batch.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        init: Initializer,
        *,
        recompute_core: bool = False,
        row_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.row_length = config, init.mesh, row_length
        self.recompute_core = recompute_core
        assert config.head_dim is not None  # resolved by ModelConfig; the rules refuse what does not divide
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.replicate_kv = config.num_key_value_heads < self.mesh["tp"].size
        kv_dim = None if self.replicate_kv else 0
        self.q_proj = init.weight(f"{name}.q_proj", (queries, hidden), shard_dim=0)
        key_and_value = {f"{name}.k_proj": (keys, hidden), f"{name}.v_proj": (keys, hidden)}
        self.kv_proj = init.stacked(key_and_value, shard_dim=kv_dim)
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the output of self-attention
        self.o_proj = init.weight(f"{name}.o_proj", (hidden, queries), shard_dim=1, scale=scale)
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", self.head_dim, config.rms_norm_eps, init, partial=True)
            self.k_norm = RMSNorm(f"{name}.k_norm", self.head_dim, config.rms_norm_eps, init, partial=True)

    def forward(
        self, x_SH: torch.Tensor, cu_seqlens: torch.Tensor, memory: Memory, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """cu_seqlens: int32 [documents + 1], borders of the documents among the T tokens.

        cache: of the layer, for decoding; keeps the keys and values of `memory`, which are made in the first step.
        """
        q = column_linear(x_SH, self.q_proj, self.mesh).unflatten(-1, (-1, self.head_dim))
        known = None if cache is None else cache.memory
        k, v = self.project(memory.states_MH) if known is None else known
        if cache is not None:
            cache.memory = k, v
        if self.config.qk_norm:
            q = self.q_norm(q)
        if self.recompute_core and torch.is_grad_enabled():
            borders = cu_seqlens, memory.cu_seqlens
            out_TND = checkpoint(self.core, q, k, v, *borders, use_reentrant=False, preserve_rng_state=False)
        else:
            out_TND = self.core(q, k, v, cu_seqlens, memory.cu_seqlens)
        return row_linear(out_TND.flatten(1), self.o_proj, self.mesh)

    def project(self, states_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's states, [E, N_kv, D] each, normed."""
        weight: torch.Tensor = self.kv_proj
        if self.replicate_kv:
            weight = torch.cat([rows_of_kv_head(part, self.config, self.mesh) for part in weight.chunk(2)])
        projected = column_linear(states_MH, weight, self.mesh)
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected.chunk(2, dim=-1))
        return self.k_norm(k) if self.config.qk_norm else k, v

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_queries: torch.Tensor, cu_keys: torch.Tensor
    ) -> torch.Tensor:
        """q [T, N, D], k and v [E, N_kv, D] -> [T, N, D]; all tokens are here."""
        longest = self.row_length if self.training else None  # outside training documents may be longer than rows
        return cross_attention(q, k, v, cu_queries, cu_keys, longest=longest)
