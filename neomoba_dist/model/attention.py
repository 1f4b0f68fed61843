"""Grouped-query self-attention (arXiv 2305.13245) whose core is MoBA (arXiv 2502.13189) or full attention.

Shape letters: T tokens, S tokens of this rank (T / tp under sequence parallelism), H hidden size, N heads of this
rank, D head size. Query heads are split over tp. KV heads are too where they suffice; with fewer KV heads than ranks
every rank holds all KV weights, uses the one head its query heads belong to, and the weights' gradients are summed.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.kernels.dense import full_attention
from neomoba_dist.model.moba import moba_attention
from neomoba_dist.model.norm import RMSNorm
from neomoba_dist.model.positions import apply_rope, rope_cos_sin
from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.megatron import column_linear, row_linear


class Attention(nn.Module):
    """x [S, H] -> [S, H]. `full` says whether the core is full attention now; `always_full` that it always is."""

    def __init__(
        self, name: str, config: ModelConfig, init: Initializer, *, always_full: bool, recompute_core: bool
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, init.mesh
        self.always_full = self.full = always_full
        self.recompute_core = recompute_core
        hidden, head_dim = config.hidden_size, config.head_dim
        tp = self.mesh["tp"]
        self.replicate_kv = config.num_key_value_heads < tp.size
        self.num_query_heads = config.num_attention_heads // tp.size
        self.num_kv_heads = 1 if self.replicate_kv else config.num_key_value_heads // tp.size
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        kv_dim = None if self.replicate_kv else 0
        self.q_proj = init.weight(f"{name}.q_proj", (queries, hidden), shard_dim=0)
        self.k_proj = init.weight(f"{name}.k_proj", (keys, hidden), shard_dim=kv_dim)
        self.v_proj = init.weight(f"{name}.v_proj", (keys, hidden), shard_dim=kv_dim)
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the MLP's output
        self.o_proj = init.weight(f"{name}.o_proj", (hidden, queries), shard_dim=1, scale=scale)
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, config.rms_norm_eps, init, partial=True)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, config.rms_norm_eps, init, partial=True)

    def forward(self, x_SH: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """position_ids int64 [T], cu_seqlens int32 [max_documents + 1]: those of all T tokens."""
        head_dim = self.config.head_dim
        weight = torch.cat((self.q_proj, self._kv_weight(self.k_proj), self._kv_weight(self.v_proj)))
        q, k, v = (
            part.unflatten(-1, (-1, head_dim))
            for part in column_linear(x_SH, weight, self.mesh).split(
                [n * head_dim for n in (self.num_query_heads, self.num_kv_heads, self.num_kv_heads)], dim=-1
            )
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope_cos_sin(position_ids, head_dim, self.config.rope_theta)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.recompute_core and torch.is_grad_enabled():
            out_TND = checkpoint(self.core, q, k, v, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        else:
            out_TND = self.core(q, k, v, cu_seqlens)
        return row_linear(out_TND.flatten(1), self.o_proj, self.mesh)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Attention within documents: q [T, N, D], k and v [T, N_kv, D] -> [T, N, D]."""
        config = self.config
        if self.full:
            return full_attention(q, k, v, causal=config.causal, cu_seqlens=cu_seqlens)
        return moba_attention(
            q,
            k,
            v,
            block_size=config.moba_block_size,
            top_k=config.moba_top_k,
            causal=config.causal,
            cu_seqlens=cu_seqlens,
        )

    def _kv_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of the KV heads that this rank's query heads attend to."""
        if not self.replicate_kv:
            return weight
        tp = self.mesh["tp"]
        head = tp.index * self.config.num_key_value_heads // tp.size
        return sum_gradient(weight, self.mesh, "tp").narrow(0, head * self.config.head_dim, self.config.head_dim)


def set_full_attention(model: nn.Module, full: bool) -> None:
    """Switch the MoBA layers of `model` to full attention or back; the last, always full layers stay as they are."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.full = full or module.always_full
