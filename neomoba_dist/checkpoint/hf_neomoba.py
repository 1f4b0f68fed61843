"""Our own layers, MoBA among them, in a modelling file of their own that travels with the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from neomoba_dist.checkpoint.hf_family import Family, Source
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig

_OWN_KEYS = (
    "objective", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "mlp_activation", "max_position_embeddings", "norm", "norm_placement",
    "embedding_norm", "rms_norm_eps", "qk_norm", "prediction_head", "tie_word_embeddings", "position_embedding",
    "rope_theta", "rope_scaling_type", "rope_scaling_factor", "original_max_position_embeddings", "moba_block_size",
    "moba_top_k", "moba_gate", "moba_pooling", "sliding_window", "sliding_rope_theta", "global_tokens",
    "key_conv_width", "type_vocab_size", "initializer_range", "num_experts", "num_experts_per_tok",
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

    norm_parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    found = {"embedding.weight": here("embedding.weight")}
    if model.type_vocab_size:
        found["embedding.token_types"] = here("token_types.weight")
    if model.embedding_norm:
        found |= norm("embedding_norm")
    if model.prediction_head:
        found |= {"head.bias": Source(("head.bias",)), "head.dense": Source(("transform.dense",))}
        found |= {f"head.norm.{part}": Source((f"transform.norm.{part}",)) for part in norm_parts}
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
        found |= norm(f"blocks.{i}.mlp_norm")
        if model.has_attention_norm(i):
            found |= norm(f"blocks.{i}.attention_norm")
    return found


NEOMOBA = Family("NeoMobaForCausalLM", _own_keys, _own_config, _own_sources)
