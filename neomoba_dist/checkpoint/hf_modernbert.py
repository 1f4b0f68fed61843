"""ModernBERT (arXiv 2412.13663): windows between global layers, each kind with its own rotation, and BERT's head."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch

from neomoba_dist.checkpoint.hf_family import Family, Source, require, require_plain, rope_config, rope_keys
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig

_KINDS = {"full_attention": "full", "sliding_attention": "sliding_window"}  # by their name
_ACTIVATIONS = {"gelu": "geglu", "silu": "swiglu"}
# what nothing here has, or has no choice about
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "decoder_bias": True,
}


def _to_model(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in _FIXED.items():
        require(config, key, value)
    require(config, "hidden_activation", *_ACTIVATIONS)
    kinds = _layer_kinds(config)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        **{name: config[name] for name in (*names, "max_position_embeddings")},
        **_rotations(config, kinds),
        "objective": "mlm",
        "num_key_value_heads": config["num_attention_heads"],
        "mlp_activation": _ACTIVATIONS[config.get("hidden_activation", "gelu")],
        "norm": "layernorm" if config.get("norm_bias") else "layernorm_no_bias",
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "embedding_norm": True,
        "prediction_head": True,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
        "attention": ",".join(f"{kind}*{len(list(alike))}" for kind, alike in groupby(kinds)),
        "hybrid_layer_count": 0,
        # theirs counts the keys on both sides, ours on one side with the token itself
        "sliding_window": config.get("local_attention", 128) // 2 + 1,
    }


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """Kind of every layer, as transformers 5 ("layer_types") or earlier versions write it."""
    every = config.get("global_attn_every_n_layers", 3)
    names = config.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    if unknown := sorted(set(names) - _KINDS.keys()):
        raise CheckpointError(f'config.json: "layer_types": {unknown[0]!r} has no counterpart here')
    return [_KINDS[name] for name in names]


def _rotations(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Those of global and of local layers, as transformers 5 ("rope_parameters") or earlier versions write them."""
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    base = config.get("global_rope_theta", 160000.0)
    default = {"full_attention": base, "sliding_attention": config.get("local_rope_theta", 10000.0) or base}
    found = {
        kind: rope_keys({"rope_parameters": {"rope_theta": theta, **(given.get(kind) or {}), **scaling}})
        for kind, theta in default.items()
    }
    usual, local = found["full_attention"], found["sliding_attention"]
    if "sliding_window" not in kinds or local == usual:
        return usual
    if "rope_scaling_type" in local:
        raise CheckpointError(
            f'config.json: "rope_type": {local["rope_scaling_type"]!r} of sliding_attention has no counterpart here, '
            "but where full_attention has the same"
        )
    return {**usual, "sliding_rope_theta": local["rope_theta"]}


def _from_model(model: ModelConfig) -> dict[str, Any]:
    heads = {
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.hidden_size / model.num_attention_heads,
    }
    parts = {"embedding_norm": True, "prediction_head": True, "global_tokens": 0, "qk_norm": False, "num_experts": 0}
    norm = "layernorm" if model.norm == "layernorm" else "layernorm_no_bias"
    activation = model.mlp_activation if model.mlp_activation in _ACTIVATIONS.values() else "geglu"
    wanted = {"objective": "mlm", "norm": norm, "mlp_activation": activation, **parts, **heads}
    require_plain(model, "modernbert", kinds=set(_KINDS.values()), **wanted)
    usual = rope_config(model)
    local = usual
    if model.sliding_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": model.sliding_rope_theta}
    names = {kind: name for name, kind in _KINDS.items()}
    layers = [names[kind] for kind in model.layer_attentions]
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_activation": next(name for name, ours in _ACTIVATIONS.items() if ours == model.mlp_activation),
        "norm_bias": model.norm == "layernorm",
        "norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "layer_types": layers,
        "local_attention": 2 * (model.sliding_window - 1),
        "rope_parameters": {"full_attention": usual, "sliding_attention": local},
        **_for_earlier_versions(layers, usual, local),
        "initializer_range": model.initializer_range,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        **_FIXED,
    }


def _for_earlier_versions(layers: list[str], usual: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads instead; it has one pattern of layers, a global one first in every so many."""
    keys = {"global_rope_theta": usual["rope_theta"], "local_rope_theta": local["rope_theta"]}
    globals_at = [i for i, kind in enumerate(layers) if kind == "full_attention"]
    every = globals_at[1] if len(globals_at) > 1 else len(layers)
    return {**keys, "global_attn_every_n_layers": every} if globals_at == list(range(0, len(layers), every)) else keys


def _sources(model: ModelConfig) -> dict[str, Source]:
    def norm(ours: str, theirs: str) -> dict[str, Source]:
        parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
        return {f"{ours}.{part}": Source((f"{theirs}.{part}",)) for part in parts}

    def cut(theirs: str, number: int, size: int) -> Source:
        return Source((theirs,), rows=torch.arange(number * size, (number + 1) * size))

    found = {"embedding.weight": Source(("model.embeddings.tok_embeddings.weight",))}
    found |= norm("embedding_norm", "model.embeddings.norm") | norm("final_norm", "model.final_norm")
    found |= {"head.dense": Source(("head.dense.weight",)), **norm("head.norm", "head.norm")}
    found["head.bias"] = Source(("decoder.bias",))
    if not model.tie_word_embeddings:
        found["head.weight"] = Source(("decoder.weight",))
    for i in range(model.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        if model.has_attention_norm(i):
            found |= norm(f"{ours}.attention_norm", f"{theirs}.attn_norm")
        found |= norm(f"{ours}.mlp_norm", f"{theirs}.mlp_norm")
        for number, part in enumerate("qkv"):
            found[f"{ours}.attention.{part}_proj"] = cut(f"{theirs}.attn.Wqkv.weight", number, model.hidden_size)
        found[f"{ours}.attention.o_proj"] = Source((f"{theirs}.attn.Wo.weight",))
        for number, part in enumerate(("gate", "up")):
            found[f"{ours}.mlp.{part}_proj"] = cut(f"{theirs}.mlp.Wi.weight", number, model.intermediate_size)
        found[f"{ours}.mlp.down_proj"] = Source((f"{theirs}.mlp.Wo.weight",))
    return found


MODERNBERT = Family("ModernBertForMaskedLM", _to_model, _from_model, _sources, output="decoder.weight")
