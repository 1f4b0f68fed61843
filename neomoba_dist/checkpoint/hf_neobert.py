"""NeoBERT as published (arXiv 2502.19587): one matrix for q, k and v of each head, rotations of neighbouring pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from neomoba_dist.checkpoint.hf_family import Family, Source, require_plain
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig


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
    heads: dict[str, Any] = {"num_key_value_heads": model.num_attention_heads}
    same: dict[str, Any] = {"rope_scaling_type": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
    require_plain(model, "neobert", objective="mlm", qk_norm=False, num_experts=0, **heads, **same)
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


NEOBERT = Family("NeoBERTLMHead", _neobert_keys, _neobert_config, _neobert_sources)
