"""Dense decoders with and without norms on queries and keys (Qwen3, Llama), and with experts (Qwen3-MoE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from neomoba_dist.checkpoint.hf_family import Family, Source, require, require_plain, rope_config, rope_keys
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig


def _decoder_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in (("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False)):
        require(config, key, value, None)
    require(config, "hidden_act", "silu")
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )  # fmt: skip
    return {
        **{name: config[name] for name in names},
        **rope_keys(config),
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
    require(config, "decoder_sparse_step", 1)
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


def _decoder_config(model: ModelConfig) -> dict[str, Any]:
    rope = rope_config(model)
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
    require_plain(model, "llama", objective="clm", qk_norm=False, num_experts=0)
    return {**_decoder_config(model), "mlp_bias": False}


def _qwen3_config(model: ModelConfig) -> dict[str, Any]:
    require_plain(model, "qwen3", objective="clm", qk_norm=True, num_experts=0)
    return {**_decoder_config(model), "use_sliding_window": False}


def _qwen3_moe_config(model: ModelConfig) -> dict[str, Any]:
    require_plain(model, "qwen3_moe", objective="clm", qk_norm=True)
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


QWEN3 = Family("Qwen3ForCausalLM", _qwen3_keys, _qwen3_config, _decoder_sources)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", _qwen3_moe_keys, _qwen3_moe_config, _decoder_sources)
LLAMA = Family("LlamaForCausalLM", _decoder_keys, _llama_config, _decoder_sources)
