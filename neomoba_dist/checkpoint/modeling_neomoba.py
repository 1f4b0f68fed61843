"""NeoBERT-MoBA for `transformers`: one file without other parts of its project, as `trust_remote_code` loads it.

`AutoModel`, `AutoModelForCausalLM` and `AutoModelForMaskedLM` give the logits of the project's own model. MoBA (Mixture
of Block Attention, arXiv 2502.13189) is registered as the attention implementation "moba": every query attends to its
current block and to the few others whose pooled keys fit it best. It masks dense scores in chunks of queries, which is
exact and takes the time of full attention; for long contexts use the project itself. Texts may be padded on either
side.

Shape letters: B texts, L tokens, T all keys (those of a cache first), H hidden size, N query heads, G KV heads, D head
size.
"""

import math
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

QUERIES = 512  # of a chunk
# newer versions say "cache"
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class NeoMobaConfig(PretrainedConfig):
    """The keys of `neomoba.model`. decode_attention: what MoBA layers run for tokens after a cached prompt, "full" as
    in the paper, or "moba"."""

    model_type = "neomoba"

    def __init__(
        self,
        objective: str = "clm",
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int = 2048,
        mlp_activation: str = "swiglu",
        max_position_embeddings: int = 32768,
        norm: str = "rmsnorm",
        norm_placement: str = "pre",
        embedding_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        qk_norm: bool = False,
        prediction_head: bool = False,
        position_embedding: str = "rope",
        rope_theta: float = 10000.0,
        rope_scaling_type: str | None = None,
        rope_scaling_factor: float = 1.0,
        original_max_position_embeddings: int | None = None,
        layer_attentions: list[str] | None = None,
        moba_block_size: int = 512,
        moba_top_k: int = 3,
        moba_gate: str = "per_head",
        moba_pooling: str = "mean",
        sliding_window: int = 512,
        sliding_rope_theta: float | None = None,
        global_tokens: int = 0,
        key_conv_width: int = 0,
        type_vocab_size: int = 0,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int | None = None,
        moe_layers: list[int] | None = None,
        router_scoring: str = "softmax",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        decode_attention: str = "full",
        initializer_range: float = 0.02,
        **kwargs: object,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.layer_attentions = layer_attentions or ["full"] * num_hidden_layers
        self.layer_types = ["full_attention"] * num_hidden_layers  # for caches: all keys are kept, also of windows
        self.moe_layers = moe_layers or []
        self.is_decoder = objective == "clm"
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNormWithoutBias(nn.LayerNorm):
    """(x - mean(x)) / deviation * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps, bias=False)


NORMS = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm, "layernorm_no_bias": LayerNormWithoutBias}


def rope_frequencies(config: NeoMobaConfig, device: torch.device, kind: str) -> tuple[torch.Tensor, float]:
    """Radians per position of every pair, float64 [D / 2], and what rotated queries and keys are multiplied with.

    kind: of the layer; windows may have a base of their own, which is not scaled.
    """
    size, theta, factor = config.head_dim, config.rope_theta, config.rope_scaling_factor
    exponent = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
    if kind == "sliding_window" and config.sliding_rope_theta is not None:
        return config.sliding_rope_theta**-exponent, 1.0
    if config.rope_scaling_type == "ntk":
        theta *= factor ** (size / (size - 2))
    frequencies = theta**-exponent
    if config.rope_scaling_type == "linear":
        return frequencies / factor, 1.0
    if config.rope_scaling_type != "yarn":
        return frequencies, 1.0
    trained = config.original_max_position_embeddings or config.max_position_embeddings

    def pair(rotations: int) -> float:
        return size * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), size - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(size // 2, dtype=torch.float64, device=device) - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1.0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D / 2) of x [B, heads, L, D], cos and sin [B, L, D / 2]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def pool_blocks(k: torch.Tensor, block: torch.Tensor, count: int, pooling: str) -> torch.Tensor:
    """What stands for each block, [B, G, count, D] (minmax: 2 D), in the keys' dtype. block [B, T], -1: padding."""
    member = block[:, None] == torch.arange(count, device=k.device)[:, None]  # [B, count, T]
    inside = member[:, None, :, :, None]
    if pooling == "mean":
        total = torch.einsum("bnt,bgtd->bgnd", member.to(torch.float32), k.to(torch.float32))
        return (total / member.sum(-1).clamp(min=1)[:, None, :, None]).to(k.dtype)
    if pooling == "representative":
        last = torch.where(member, torch.arange(k.shape[2], device=k.device), -1).amax(-1).clamp(min=0)
        return k.gather(2, last[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    largest = k[:, :, None].masked_fill(~inside, -torch.inf).amax(3)
    if pooling == "max":
        return largest
    return torch.cat((largest, k[:, :, None].masked_fill(~inside, torch.inf).amin(3)), dim=-1)


def moba_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor | None = None,
    kind: str = "moba",
    **_: object,
) -> tuple[torch.Tensor, None]:
    """[B, N, L, D], keys and values [B, G, T, D] -> [B, L, N, D]. attention_mask bool [B, T]: what is no padding.

    positions [B, T]: of the keys within their text; the queries are the last L of them. kind: "moba", "full" or
    "sliding_window".
    """
    config, tokens = module.config, key.shape[2]
    assert positions is not None
    assert attention_mask is not None
    groups, length = key.shape[1], query.shape[2]
    size = config.moba_block_size if kind == "moba" else tokens
    block = torch.where(attention_mask, positions // size, -1)
    count = int(block.max()) + 1
    if count > 1:
        pooled = pool_blocks(key, block, count, config.moba_pooling).to(torch.float32)
        gate = query.to(torch.float32).unflatten(1, (groups, -1))
        if config.moba_pooling == "minmax":
            gate = torch.cat((gate.clamp(min=0), gate.clamp(max=0)), dim=-1)
        if config.moba_gate == "kv_group":
            gate = gate.sum(2, keepdim=True).expand_as(gate)
    parts = []
    for first in range(0, length, QUERIES):
        rows = slice(first, min(first + QUERIES, length))
        own = block[:, tokens - length :][:, rows]
        seen = attention_mask[:, None] & (own >= 0)[:, :, None]
        if config.is_decoder:
            seen = seen & (positions[:, None] <= positions[:, tokens - length :][:, rows, None])
        if kind == "sliding_window":
            seen = seen & in_window(positions[:, tokens - length :][:, rows], positions, config)
        seen = seen[:, None]
        if count > 1:
            scores = torch.einsum("bgrqd,bgnd->bgrqn", gate[:, :, :, rows], pooled).flatten(1, 2)
            seen = seen & chosen_blocks(scores, own, config, block)
        part = F.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=seen, enable_gqa=True)
        parts.append(part.masked_fill((own < 0)[:, None, :, None], 0))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def in_window(query: torch.Tensor, key: torch.Tensor, config: NeoMobaConfig) -> torch.Tensor:
    """Whether a query at a position [B, Q] is near a key at one [B, T], or one of the two is global: bool [B, Q, T]."""
    query, key = query[..., None], key[:, None]
    near = (query - key).abs() < config.sliding_window
    return near | (key < config.global_tokens) | (query < config.global_tokens)


def chosen_blocks(scores: torch.Tensor, own: torch.Tensor, config: NeoMobaConfig, block: torch.Tensor) -> torch.Tensor:
    """Whether a query attends to the block of a key: bool [B, N, Q, T]. scores [B, N, Q, blocks], own [B, Q].

    The current block always, of the others the best; ties go to the later block.
    """
    number = torch.arange(scores.shape[-1], device=scores.device)
    limit = own if config.is_decoder else block.amax(1, keepdim=True) + 1
    candidate = (number < limit[..., None]) & (number != own[..., None])
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(~candidate[:, None], -torch.inf)
    picked = (number == own[..., None])[:, None].expand(scores.shape).clone()
    ranked = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    best = scores.shape[-1] - 1 - ranked.indices[..., : config.moba_top_k - 1]
    picked.scatter_(-1, best, picked.gather(-1, best) | (ranked.values[..., : best.shape[-1]] > -torch.inf))
    index = block.clamp(min=0)[:, None, None].expand(*picked.shape[:3], -1)
    return picked.gather(-1, index)


AttentionInterface.register("moba", moba_attention)


class Attention(nn.Module):
    """Grouped queries, norms on queries and keys, a convolution over the keys, rotation, and the attention proper."""

    def __init__(self, config: NeoMobaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, self.kind = config, index, config.layer_attentions[index]
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Parameter(torch.empty(config.num_attention_heads * size, hidden))
        self.k_proj = nn.Parameter(torch.empty(config.num_key_value_heads * size, hidden))
        self.v_proj = nn.Parameter(torch.empty(config.num_key_value_heads * size, hidden))
        self.o_proj = nn.Parameter(torch.empty(hidden, config.num_attention_heads * size))
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for _ in range(2))
        if config.key_conv_width:
            self.key_conv = nn.Parameter(torch.empty(config.num_key_value_heads * size, config.key_conv_width))

    def forward(
        self,
        x: torch.Tensor,
        ropes: dict[str, tuple[torch.Tensor, torch.Tensor]],
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """x [B, L, H]; mask bool and positions [B, T]."""
        q, k, v = (
            (x @ weight.T).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.key_conv_width:
            k = self.convolve(k, mask, cache)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if ropes:
            q, k = rotate(q, *ropes[self.kind]), rotate(k, *ropes[self.kind])
        decoding = cache is not None and cache.get_seq_length(self.index) > 0
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        kind = self.kind
        if decoding and kind == "moba":
            kind = self.config.decode_attention
        out, _ = moba_attention(self, q, k, v, mask, positions, kind)
        return out.flatten(2) @ self.o_proj.T

    def convolve(self, k: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """k[t] + silu(sum of the taps), in float32; the keys before a cached step are kept in the cache."""
        width, causal = self.config.key_conv_width, self.config.is_decoder
        k = k.masked_fill(~mask[:, None, mask.shape[1] - k.shape[2] :, None], 0)  # nothing comes from padding
        before = width - 1 if causal else width // 2
        earlier = k.new_zeros(*k.shape[:2], before, k.shape[3])
        if cache is not None:
            kept = cache.__dict__.setdefault("conv_keys", {})
            earlier = kept.get(self.index, earlier)
            kept[self.index] = torch.cat((earlier, k), dim=2)[:, :, -before:]
        exact = torch.promote_types(k.dtype, torch.float32)
        padded = F.pad(torch.cat((earlier, k), dim=2), (0, 0, 0, width - 1 - before)).to(exact)
        taps = self.key_conv.to(exact).T.unflatten(1, (k.shape[1], 1, k.shape[3]))
        total = sum(tap * padded[:, :, at : at + k.shape[2]] for at, tap in enumerate(taps))
        return (k.to(exact) + F.silu(total)).to(k.dtype)


class GatedMLP(nn.Module):
    """down(f(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(width, hidden)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.activation(x @ self.gate_proj.T) * (x @ self.up_proj.T)) @ self.down_proj.T


class PlainMLP(nn.Module):
    """down(f(up x))."""

    def __init__(self, hidden: int, width: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x @ self.up_proj.T) @ self.down_proj.T


MLPS = {
    "swiglu": (GatedMLP, F.silu),
    "geglu": (GatedMLP, F.gelu),
    "relu": (PlainMLP, F.relu),
    "gelu": (PlainMLP, F.gelu),
    "silu": (PlainMLP, F.silu),
}


class Router(nn.Module):
    """The experts of every token and their weights; the bias counts for the choice alone."""

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, H] -> experts int64 and weights, both [tokens, K]."""
        logits = F.linear(x.to(torch.float32), self.weight.to(torch.float32))
        scores = logits.softmax(-1) if self.config.router_scoring == "softmax" else logits.sigmoid()
        ranked = (scores + self.bias).sort(dim=-1, descending=True, stable=True).indices
        experts = ranked[:, : self.config.num_experts_per_tok]
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(weights.dtype).tiny)
        return experts, weights * self.config.routed_scaling_factor


class Experts(nn.Module):
    """The SwiGLUs of all experts, stacked."""

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__()
        count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(count, width, hidden)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))


class MoE(nn.Module):
    """The weighted sum of each token's experts."""

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, part = x.flatten(0, 1), self.experts
        chosen, weights = self.router(flat)
        out = torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        for expert in range(len(part.gate_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            y = flat[token]
            y = (F.silu(y @ part.gate_proj[expert].T) * (y @ part.up_proj[expert].T)) @ part.down_proj[expert].T
            out.index_add_(0, token, y.to(out.dtype) * weights[token, place, None].to(out.dtype))
        return out.to(x.dtype).view_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NeoMobaConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        if index == 0 and config.embedding_norm and config.norm_placement == "pre":
            self.attention_norm = nn.Identity()  # it would norm a second time
        self.attention = Attention(config, index)
        self.mlp_norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        if index in config.moe_layers:
            self.mlp = MoE(config)
        else:
            mlp, activation = MLPS[config.mlp_activation]
            self.mlp = mlp(config.hidden_size, config.intermediate_size, activation)

    def forward(self, x: torch.Tensor, *context: object) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def forward(self, x: torch.Tensor, *context: object) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, *context))
        return self.mlp_norm(x + self.mlp(x))


BLOCKS = {"pre": Block, "post": PostNormBlock}


class NeoMobaPreTrainedModel(PreTrainedModel):
    """What all heads share."""

    config_class = NeoMobaConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block", "PostNormBlock"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name != "bias" and not isinstance(module, tuple(NORMS.values())):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class NeoMobaModel(NeoMobaPreTrainedModel):
    """Hidden states after the final norm."""

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_types: nn.Embedding | None = None
        if config.type_vocab_size:
            self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        block, norm = BLOCKS[config.norm_placement], NORMS[config.norm]
        size = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = norm(*size) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(block(config, index) for index in range(config.num_hidden_layers))
        last = config.norm_placement == "pre"
        self.final_norm = norm(*size) if last else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        cache: DynamicCache | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, L]; attention_mask [B, T], 0 is padding. cache, past_key_values: the same by either name.
        token_type_ids [B, L]: 1 in the second text of a pair, else 0."""
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None and self.config.is_decoder:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        total = past + input_ids.shape[1]
        mask = torch.ones(len(input_ids), total, dtype=torch.bool, device=input_ids.device)
        if attention_mask is not None:
            mask = attention_mask[:, :total].bool()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        ropes = {}
        for kind in set(self.config.layer_attentions) if self.config.position_embedding == "rope" else ():
            frequencies, temperature = rope_frequencies(self.config, input_ids.device, kind)
            angle = positions[:, past:].to(torch.float64)[..., None] * frequencies
            ropes[kind] = angle.cos() * temperature, angle.sin() * temperature
        x = self.embedding(input_ids)
        if self.token_types is not None:
            x = x + self.token_types(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        x = self.embedding_norm(x)
        for block in self.blocks:
            x = block(x, ropes, mask, positions, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.final_norm(x), **{CACHE: cache})


class PredictionHead(nn.Module):
    """norm(gelu(x W^T)), before the output matrix."""

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(x @ self.dense.T))


class _Head(NeoMobaPreTrainedModel):
    _tied_weights_keys = {"head.weight": "model.embedding.weight"}

    def __init__(self, config: NeoMobaConfig) -> None:
        super().__init__(config)
        self.model = NeoMobaModel(config)
        self.transform = PredictionHead(config) if config.prediction_head else nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.prediction_head)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value


class NeoMobaForCausalLM(_Head, GenerationMixin):
    """A decoder with its head."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: DynamicCache | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """labels [B, L]: as `input_ids`, -100 is not counted."""
        found = self.model(input_ids, attention_mask, past_key_values, use_cache, cache)
        logits = self.head(self.transform(found.last_hidden_state[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: found.get(CACHE)})


class NeoMobaForMaskedLM(_Head):
    """An encoder with its head."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: object,
    ) -> MaskedLMOutput:
        """labels [B, L]: the tokens behind the masks, -100 elsewhere. token_type_ids: see `NeoMobaModel`."""
        states = self.model(input_ids, attention_mask, token_type_ids=token_type_ids).last_hidden_state
        logits = self.head(self.transform(states))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
