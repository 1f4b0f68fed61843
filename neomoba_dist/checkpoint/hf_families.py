"""Published architectures that compute what our layers compute: their configurations, and where our tensors lie.

    qwen3, llama       dense decoders, with and without norms on queries and keys
    qwen3_moe          experts in every layer
    neobert            the published encoder: one matrix for q, k and v of each head, rotations of neighbouring pairs
    neomoba            our own layers, MoBA among them, in a modelling file of their own that travels with the folder

What a configuration asks for and our layers do not compute is refused in one line that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """Where a logical tensor lies: one tensor, or the stack of several; `rows` picks rows of it, None: all. `zeros`:
    nowhere; it is of this shape and zero."""

    names: tuple[str, ...] = ()
    stacked: bool = False
    rows: torch.Tensor | None = None
    zeros: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """One published architecture.

    to_model: its config.json -> keys of neomoba.model; raises CheckpointError. from_model: the way back.
    sources: every logical tensor by name.
    """

    architecture: str  # "neomoba": for its decoders; encoders end in ForMaskedLM
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    sources: Callable[[ModelConfig], dict[str, Source]]


def _require(config: Mapping[str, Any], key: str, *values: Any) -> None:
    """Raises CheckpointError where a key of config.json asks for what no layer of ours computes."""
    if (value := config.get(key, values[0])) not in values:
        raise CheckpointError(f'config.json: "{key}": {value!r} has no counterpart here; only {values[0]!r} has')


def _rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Positions, as transformers 5 ("rope_parameters") or earlier versions write them."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
        usual = {"beta_fast": 32, "beta_slow": 1}.get(key)
        if rope.get(key) not in (None, usual):
            raise CheckpointError(f'config.json: rope parameter "{key}": {rope[key]} has no counterpart here')
    _require(rope, "partial_rotary_factor", 1.0, 1, None)
    keys: dict[str, Any] = {"position_embedding": "rope", "rope_theta": float(rope.get("rope_theta", 10000.0))}
    if kind == "default":
        return keys
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f'config.json: "rope_type": {kind!r} has no counterpart here; default, linear, yarn have')
    keys |= {"rope_scaling_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        keys["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    return keys


def _decoder_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in (("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False)):
        _require(config, key, value, None)
    _require(config, "hidden_act", "silu")
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )  # fmt: skip
    return {
        **{name: config[name] for name in names},
        **_rope_keys(config),
        "objective": "clm",
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention": "full",
        "hybrid_layer_count": 0,
    }


def _qwen3_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_decoder_keys(config), "qk_norm": True}


def _qwen3_moe_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "decoder_sparse_step", 1)
    dense = list(config.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise CheckpointError(f'config.json: "mlp_only_layers": {dense}: only the first layers can be dense here')
    return {
        **_qwen3_keys(config),
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "num_experts_per_tok": config["num_experts_per_tok"],
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "first_k_dense_replace": len(dense),
    }


def _require_plain(model: ModelConfig, family: str, **wanted: Any) -> None:
    """Raises CheckpointError where a model is not what a family computes: `wanted`, and the defaults of rare keys."""
    plain: dict[str, Any] = {"position_embedding": "rope", "key_conv_width": 0, "norm": "rmsnorm",
                             "norm_placement": "pre", "mlp_activation": "swiglu", "type_vocab_size": 0}  # fmt: skip
    if model.num_experts:
        plain |= {"num_shared_experts": 0, "n_group": 1, "routed_scaling_factor": 1.0, "moe_capacity_factor": None,
                  "router_scoring": "softmax", "router_bias_update_rate": 0.0, "moe_layer_frequency": 1}  # fmt: skip
    for key, value in {**plain, **wanted}.items():
        if (own := getattr(model, key)) != value:
            raise CheckpointError(f"{family} has no counterpart of neomoba.model.{key} {own!r}, only of {value!r}")
    if other := set(model.layer_attentions) - {"full"}:
        raise CheckpointError(f"{family} has full attention in all layers, and this model {', '.join(sorted(other))}")


def _decoder_config(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": model.rope_scaling_type or "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_type == "ntk":
        raise CheckpointError("the hub's formats have no counterpart of neomoba.model.rope_scaling_type 'ntk'")
    if model.rope_scaling_type:
        rope["factor"] = model.rope_scaling_factor
    if model.rope_scaling_type == "yarn":
        original = model.original_max_position_embeddings or model.max_position_embeddings
        rope["original_max_position_embeddings"] = original
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    keys = asdict(model)
    return {
        **{name: keys[name] for name in names},
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,  # for transformers before 5
        "rope_scaling": rope if model.rope_scaling_type else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "initializer_range": model.initializer_range,
        "use_cache": True,
    }


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    _require_plain(model, "llama", objective="clm", qk_norm=False, num_experts=0)
    return {**_decoder_config(model), "mlp_bias": False}


def _qwen3_config(model: ModelConfig) -> dict[str, Any]:
    _require_plain(model, "qwen3", objective="clm", qk_norm=True, num_experts=0)
    return {**_decoder_config(model), "use_sliding_window": False}


def _qwen3_moe_config(model: ModelConfig) -> dict[str, Any]:
    _require_plain(model, "qwen3_moe", objective="clm", qk_norm=True)
    return {
        **_decoder_config(model),
        "use_sliding_window": False,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": model.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.first_k_dense_replace)),
        # theirs pools all layers and counts every choice; ours sums layers
        "router_aux_loss_coef": model.router_aux_loss_coef / model.num_experts_per_tok,
    }


def _decoder_sources(model: ModelConfig) -> dict[str, Source]:
    found = {
        "embedding.weight": Source(("model.embed_tokens.weight",)),
        "final_norm.weight": Source(("model.norm.weight",)),
    }
    if not model.tie_word_embeddings:
        found["head.weight"] = Source(("lm_head.weight",))
    for i in range(model.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.weight"] = Source((f"{theirs}.input_layernorm.weight",))
        found[f"{ours}.mlp_norm.weight"] = Source((f"{theirs}.post_attention_layernorm.weight",))
        for part in "qkvo":
            found[f"{ours}.attention.{part}_proj"] = Source((f"{theirs}.self_attn.{part}_proj.weight",))
        for part in "qk" if model.qk_norm else "":
            found[f"{ours}.attention.{part}_norm.weight"] = Source((f"{theirs}.self_attn.{part}_norm.weight",))
        if i in model.moe_layers:
            found[f"{ours}.mlp.router.weight"] = Source((f"{theirs}.mlp.gate.weight",))
            found[f"{ours}.mlp.router.bias"] = Source(zeros=(model.num_experts,))
        for part in ("gate", "up", "down"):
            if i in model.moe_layers:
                experts = range(model.num_experts)
                names = tuple(f"{theirs}.mlp.experts.{expert}.{part}_proj.weight" for expert in experts)
                found[f"{ours}.mlp.experts.{part}_proj"] = Source(names, stacked=True)
            else:
                found[f"{ours}.mlp.{part}_proj"] = Source((f"{theirs}.mlp.{part}_proj.weight",))
    return found


def _neobert_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    width = int(2 * config["intermediate_size"] / 3)  # as its own code: SwiGLU has three matrices where BERT has two
    return {
        "objective": "mlm",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": -(-width // 8) * 8,
        "max_position_embeddings": config.get("max_length", 4096),
        "rms_norm_eps": config.get("norm_eps", 1e-6),
        "rope_theta": 10000.0,
        "attention": "full",
        "hybrid_layer_count": 0,
    }


def _neobert_config(model: ModelConfig) -> dict[str, Any]:
    heads = {"num_key_value_heads": model.num_attention_heads}
    same = {"rope_scaling_type": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
    _require_plain(model, "neobert", objective="mlm", qk_norm=False, num_experts=0, **heads, **same)
    if model.intermediate_size % 8 or model.head_dim != model.hidden_size // model.num_attention_heads:
        raise CheckpointError(
            "neobert wants neomoba.model.intermediate_size a multiple of 8, and heads that share the width"
        )
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size * 3 // 2,
        "vocab_size": model.vocab_size,
        "max_length": model.max_position_embeddings,
        "norm_eps": model.rms_norm_eps,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _neobert_sources(model: ModelConfig) -> dict[str, Source]:
    assert model.head_dim is not None
    heads, size, width = model.num_attention_heads, model.head_dim, model.intermediate_size
    row = torch.arange(heads * 3 * size).view(heads, 3, size)  # of each head its q, its k, its v
    # theirs turns the pairs (2i, 2i + 1), ours (i, i + D/2)
    halves = row.unflatten(2, (size // 2, 2)).transpose(2, 3).flatten(2)
    found = {
        "embedding.weight": Source(("model.encoder.weight",)),
        "final_norm.weight": Source(("model.layer_norm.weight",)),
        "head.weight": Source(("decoder.weight",)),
    }
    for i in range(model.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.transformer_encoder.{i}"
        found[f"{ours}.attention_norm.weight"] = Source((f"{theirs}.attention_norm.weight",))
        found[f"{ours}.mlp_norm.weight"] = Source((f"{theirs}.ffn_norm.weight",))
        for number, (part, order) in enumerate((("q", halves), ("k", halves), ("v", row))):
            rows = order[:, number].flatten()
            found[f"{ours}.attention.{part}_proj"] = Source((f"{theirs}.qkv.weight",), rows=rows)
        found[f"{ours}.attention.o_proj"] = Source((f"{theirs}.wo.weight",))
        for part, first in (("gate", 0), ("up", width)):
            rows = torch.arange(first, first + width)
            found[f"{ours}.mlp.{part}_proj"] = Source((f"{theirs}.ffn.w12.weight",), rows=rows)
        found[f"{ours}.mlp.down_proj"] = Source((f"{theirs}.ffn.w3.weight",))
    return found


_OWN_KEYS = (
    "objective", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "mlp_activation", "max_position_embeddings", "norm", "norm_placement",
    "rms_norm_eps", "qk_norm", "tie_word_embeddings", "position_embedding", "rope_theta", "rope_scaling_type",
    "rope_scaling_factor", "original_max_position_embeddings", "moba_block_size", "moba_top_k", "moba_gate",
    "moba_pooling", "key_conv_width", "type_vocab_size", "initializer_range", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "router_scoring", "norm_topk_prob", "routed_scaling_factor", "moe_layer_frequency",
    "first_k_dense_replace",
)  # fmt: skip


def _own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {name: config[name] for name in _OWN_KEYS if name in config}
    return {**keys, "attention": ",".join(f"{kind}*1" for kind in config["layer_attentions"]), "hybrid_layer_count": 0}


def _own_config(model: ModelConfig) -> dict[str, Any]:
    if model.num_decoder_layers:
        raise CheckpointError("neomoba has no counterpart of an encoder-decoder (neomoba.model.num_decoder_layers)")
    plain = {"num_shared_experts": 0, "n_group": 1, "moe_capacity_factor": None}
    for key, value in plain.items() if model.num_experts else ():
        if (own := getattr(model, key)) != value:
            raise CheckpointError(f"neomoba has no counterpart of neomoba.model.{key} {own!r}, only of {value!r}")
    if model.position_embedding not in ("rope", "none"):
        raise CheckpointError(
            f"neomoba has no counterpart of neomoba.model.position_embedding {model.position_embedding!r}, only of "
            "'rope' and 'none'"
        )
    if "sliding_window" in model.layer_attentions:
        raise CheckpointError("neomoba has MoBA and full attention, and this model sliding_window")
    keys = asdict(model)
    return {
        **{name: keys[name] for name in _OWN_KEYS},
        "layer_attentions": list(model.layer_attentions),
        "moe_layers": list(model.moe_layers),
        "auto_map": {
            "AutoConfig": "modeling_neomoba.NeoMobaConfig",
            "AutoModel": "modeling_neomoba.NeoMobaModel",
            **(
                {"AutoModelForCausalLM": "modeling_neomoba.NeoMobaForCausalLM"}
                if model.causal
                else {"AutoModelForMaskedLM": "modeling_neomoba.NeoMobaForMaskedLM"}
            ),
        },
    }


def _own_sources(model: ModelConfig) -> dict[str, Source]:
    def here(name: str) -> Source:
        return Source((f"model.{name}",))

    def norm(name: str) -> dict[str, Source]:
        return {f"{name}.{part}": here(f"{name}.{part}") for part in norm_parts}

    norm_parts = ("weight",) if model.norm == "rmsnorm" else ("weight", "bias")
    found = {"embedding.weight": here("embedding.weight")}
    if model.type_vocab_size:
        found["embedding.token_types"] = here("token_types.weight")
    if model.norm_placement == "pre":
        found |= norm("final_norm")
    if not model.tie_word_embeddings:
        found["head.weight"] = Source(("head.weight",))
    for i in range(model.num_hidden_layers):
        names = [f"attention.{part}_proj" for part in "qkvo"]
        names += ["attention.q_norm.weight", "attention.k_norm.weight"] if model.qk_norm else []
        names += ["attention.key_conv"] if model.key_conv_width else []
        mixed = i in model.moe_layers
        names += ["mlp.router.weight", "mlp.router.bias"] if mixed else []
        parts = ("gate", "up", "down")[-model.mlp_matrices :]
        names += [f"mlp.{'experts.' if mixed else ''}{part}_proj" for part in parts]
        found |= {f"blocks.{i}.{name}": here(f"blocks.{i}.{name}") for name in names}
        found |= norm(f"blocks.{i}.attention_norm") | norm(f"blocks.{i}.mlp_norm")
    return found


FAMILIES: dict[str, Family] = {
    "qwen3": Family("Qwen3ForCausalLM", _qwen3_keys, _qwen3_config, _decoder_sources),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe_keys, _qwen3_moe_config, _decoder_sources),
    "llama": Family("LlamaForCausalLM", _decoder_keys, _llama_config, _decoder_sources),
    "neomoba": Family("NeoMobaForCausalLM", _own_keys, _own_config, _own_sources),
    "neobert": Family("NeoBERTLMHead", _neobert_keys, _neobert_config, _neobert_sources),
}


# layers of architectures that are asked for and that nothing here computes
NO_COUNTERPART = {
    "modernbert": (
        "embeddings.norm (a norm between embedding and first block), the first block's missing attention norm, a "
        "rotation for local layers beside that of global ones (local_rope_theta), and head.dense with head.norm "
        "(before the output matrix)"
    ),
}


def describe(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family a model goes out as, a published one where one fits, and its config.json. CheckpointError: none."""
    published = "neobert"
    if model.causal:
        published = "qwen3_moe" if model.num_experts else "qwen3" if model.qk_norm else "llama"
    try:
        name, config = published, FAMILIES[published].from_model(model)
    except CheckpointError:
        name, config = "neomoba", FAMILIES["neomoba"].from_model(model)
    architecture = FAMILIES[name].architecture
    if name == "neomoba" and not model.causal:
        architecture = "NeoMobaForMaskedLM"
    return name, {"model_type": name, "architectures": [architecture], **config}
