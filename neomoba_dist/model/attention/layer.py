"""Grouped-query self-attention (arXiv 2305.13245) whose core is MoBA (arXiv 2502.13189), full or
sliding-window attention.

Shape letters: T tokens, S tokens of this rank (T / tp under sequence parallelism), H hidden size, N heads of this
rank, D head size. Query heads are split over tp. KV heads are too where they suffice; with fewer KV heads than ranks
every rank holds all KV weights, uses the one head its query heads belong to, and the weights' gradients are summed.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.attention.cache import LayerCache
from neomoba_dist.model.attention.context.cache import ShardedLayerCache
from neomoba_dist.model.attention.context.strategy import context_attention
from neomoba_dist.model.attention.kernels.full import full_attention
from neomoba_dist.model.attention.key_conv import convolve_keys
from neomoba_dist.model.attention.moba import MobaOptions, moba_attention
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.attention.sliding_window import unusual_attention
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.norm import RMSNorm
from neomoba_dist.model.positions import ScoreBias, apply_rope
from neomoba_dist.parallel.comm import sum_gradient
from neomoba_dist.parallel.context_split import context_split
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.tensor import column_linear, row_linear


class Attention(nn.Module):
    """x [S, H] -> [S, H]. kind: "moba", "full" or "sliding_window". `full` says whether the core is full now.

    row_length: tokens of a training row, which no document exceeds; None: a document may fill the micro-batch.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        init: Initializer,
        *,
        kind: str = "moba",
        recompute_core: bool = False,
        row_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.row_length = config, init.mesh, row_length
        self.kind, self.full = kind, kind == "full"
        self.rope = "sliding_rope" if kind == "sliding_window" else "rope"
        self.recompute_core = recompute_core
        assert config.head_dim is not None  # resolved by ModelConfig; the rules refuse what does not divide
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        tp = self.mesh["tp"]
        self.replicate_kv = config.num_key_value_heads < tp.size
        self.num_query_heads = config.num_attention_heads // tp.size
        self.num_kv_heads = 1 if self.replicate_kv else config.num_key_value_heads // tp.size
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        kv_dim = None if self.replicate_kv else 0
        query = {f"{name}.q_proj": (queries, hidden)}
        key_and_value = {f"{name}.k_proj": (keys, hidden), f"{name}.v_proj": (keys, hidden)}
        if self.replicate_kv:  # q is cut over tp, k and v are not
            self.q_proj = init.weight(f"{name}.q_proj", (queries, hidden), shard_dim=0)
            self.kv_proj = init.stacked(key_and_value, shard_dim=None)
        else:
            self.qkv_proj = init.stacked(query | key_and_value, shard_dim=0)
        scale = (2 * config.num_hidden_layers) ** -0.5  # as for the MLP's output
        self.o_proj = init.weight(f"{name}.o_proj", (hidden, queries), shard_dim=1, scale=scale)
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, config.rms_norm_eps, init, partial=True)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, config.rms_norm_eps, init, partial=True)
        if config.key_conv_width:
            self.key_conv = init.weight(f"{name}.key_conv", (keys, config.key_conv_width), shard_dim=kv_dim)
        self.score_bias = ScoreBias.of(f"{name}.score_bias", config, init)

    def forward(
        self,
        x_SH: torch.Tensor,
        packed: PackedTokens,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """packed: how the T tokens are packed; it has the tables of a rotary embedding.

        cache: the keys and values of earlier tokens of the same documents; takes those of these tokens too.
        """
        q, k, v = self.project(x_SH, packed, cache)
        share = prefill_share(cache)
        if share is not None:
            share.extend(share.gather(k), share.gather(v))
            out_TND = self.spread_core(q, k, v, packed, share.prefill_kind)
        elif cache is not None:
            out_TND = self.core(q, k, v, packed, cache)
        else:
            core = self.spread_core if self.mesh["cp"].size > 1 else self.core
            if self.recompute_core and torch.is_grad_enabled():
                out_TND = checkpoint(core, q, k, v, packed, use_reentrant=False, preserve_rng_state=False)
            else:
                out_TND = core(q, k, v, packed)
        return row_linear(out_TND.flatten(1), self.o_proj, self.mesh)

    def project(
        self,
        x_SH: torch.Tensor,
        packed: PackedTokens,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the core attends with: q [T, N, D], k and v [T, N_kv, D], normed and with their positions.

        Under context parallelism T is this rank's share. cache: for a key convolution, which looks back.
        """
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in column_linear(x_SH, self._projection(), self.mesh).split(
                [n * self.head_dim for n in (self.num_query_heads, self.num_kv_heads, self.num_kv_heads)], dim=-1
            )
        )
        if self.config.key_conv_width:
            taps = self._kv_weight(self.key_conv)
            if (share := prefill_share(cache)) is not None:
                k = share.convolve_share(k, taps)
            else:
                k = cache.convolve(k, taps) if cache else self._convolve(k, taps, packed)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position_embedding == "rope":
            tables = getattr(packed, self.rope)
            assert tables is not None
            q, k = apply_rope(q, *tables), apply_rope(k, *tables)
        return q, k, v

    def core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: PackedTokens,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Attention within documents: q [T, N, D], k and v [T, N_kv, D] -> [T, N, D]; all tokens are here."""
        config, kind, cu_seqlens = self.config, "full" if self.full else self.kind, packed.cu_seqlens
        if cache is not None:
            kind, has_earlier_keys = cache.prefill_kind, cache.extend(k, v)
            if has_earlier_keys:
                return cache.attend(q, cu_seqlens, self.score_bias)
        if kind == "sliding_window" or self.score_bias is not None:
            return unusual_attention(
                q, k, v, kind, config, self.score_bias, cu_seqlens, packed.positions, packed.placed
            )
        common: dict[str, Any] = {"causal": config.causal, "cu_seqlens": cu_seqlens, "placed": packed.placed}
        if kind == "full":
            # context parallelism may pad by more than a row; outside training documents may be longer than rows
            longest = self.row_length if self.training and self.mesh["cp"].size == 1 else None
            return full_attention(q, k, v, longest=longest, **common)
        return moba_attention(q, k, v, **MobaOptions.of(config)._asdict(), **common)

    def spread_core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedTokens, kind: str | None = None
    ) -> torch.Tensor:
        """The same where the tokens lie on several context-parallel ranks. kind: what to run (default: as set)."""
        kind = kind or ("full" if self.full else self.kind)
        return context_attention(q, k, v, packed, kind=kind, config=self.config, mesh=self.mesh, core=self.core)

    def _convolve(self, k: torch.Tensor, taps: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
        """The key convolution of this rank's tokens."""
        split = None
        if self.mesh["cp"].size > 1:
            split = context_split(len(k), self.mesh, self.config)
        return convolve_keys(k, taps, packed.cu_seqlens, self.config.causal, self.mesh, split, packed.inside)

    def _projection(self) -> torch.Tensor:
        """Rows of q, k and v of this rank's query heads and the KV heads that they attend to."""
        if not self.replicate_kv:
            return self.qkv_proj
        keys, values = self.kv_proj.chunk(2)
        return torch.cat((self.q_proj, self._kv_weight(keys), self._kv_weight(values)))

    def _kv_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of the KV heads that this rank's query heads attend to."""
        return rows_of_kv_head(weight, self.config, self.mesh) if self.replicate_kv else weight


def rows_of_kv_head(weight: torch.Tensor, config: ModelConfig, mesh: Mesh) -> torch.Tensor:
    """Of a weight with the rows of all KV heads those of the one that this rank's query heads attend to."""
    assert config.head_dim is not None  # resolved by ModelConfig
    tp = mesh["tp"]
    head = tp.index * config.num_key_value_heads // tp.size
    return sum_gradient(weight, mesh, "tp").narrow(0, head * config.head_dim, config.head_dim)


def prefill_share(cache: LayerCache | None) -> ShardedLayerCache | None:
    """The cache, in the first step of a decoder whose cp ranks each compute a share of the prompts."""
    return cache if isinstance(cache, ShardedLayerCache) and cache.cache.prefilling else None


def set_full_attention(model: nn.Module, full: bool) -> None:
    """Switch MoBA and sliding-window layers of `model` to full attention or back; full layers stay as they are."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.full = full or module.kind == "full"
