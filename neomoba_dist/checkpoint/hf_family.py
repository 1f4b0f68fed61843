"""What a published architecture is here: where its configuration and its tensors meet ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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
    sources: every logical tensor by name. output: the output matrix, of which a folder may hold a copy though it is
    tied to the embedding.
    """

    architecture: str  # "neomoba": for its decoders; encoders end in ForMaskedLM
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    sources: Callable[[ModelConfig], dict[str, Source]]
    output: str = "lm_head.weight"


def require(config: Mapping[str, Any], key: str, *values: Any) -> None:
    """Raises CheckpointError where a key of config.json asks for what no layer of ours computes."""
    if (value := config.get(key, values[0])) not in values:
        raise CheckpointError(f'config.json: "{key}": {value!r} has no counterpart here; only {values[0]!r} has')


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
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
    require(rope, "partial_rotary_factor", 1.0, 1, None)
    keys: dict[str, Any] = {"position_embedding": "rope", "rope_theta": float(rope.get("rope_theta", 10000.0))}
    if kind == "default":
        return keys
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f'config.json: "rope_type": {kind!r} has no counterpart here; default, linear, yarn have')
    keys |= {"rope_scaling_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        keys["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    return keys


def require_plain(model: ModelConfig, family: str, kinds: Collection[str] = ("full",), **wanted: Any) -> None:
    """Raises CheckpointError where a model is not what a family computes: `wanted`, and the defaults of rare keys.

    kinds: of attention that its layers may have.
    """
    plain: dict[str, Any] = {"position_embedding": "rope", "key_conv_width": 0, "norm": "rmsnorm",
                             "norm_placement": "pre", "mlp_activation": "swiglu", "embedding_norm": False,
                             "prediction_head": False, "type_vocab_size": 0}  # fmt: skip
    if model.num_experts:
        plain |= {"num_shared_experts": 0, "n_group": 1, "routed_scaling_factor": 1.0, "moe_capacity_factor": None,
                  "router_scoring": "softmax", "router_bias_update_rate": 0.0, "moe_layer_frequency": 1}  # fmt: skip
    for key, value in {**plain, **wanted}.items():
        if (own := getattr(model, key)) != value:
            raise CheckpointError(f"{family} has no counterpart of neomoba.model.{key} {own!r}, only of {value!r}")
    if other := set(model.layer_attentions) - set(kinds):
        known = " or ".join(sorted(kinds))
        raise CheckpointError(
            f"{family} has {known} attention in all layers, and this model {', '.join(sorted(other))}"
        )


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """The rotation as `rope_parameters` of transformers 5; raises CheckpointError where they have no counterpart."""
    rope: dict[str, Any] = {"rope_type": model.rope_scaling_type or "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_type == "ntk":
        raise CheckpointError("the hub's formats have no counterpart of neomoba.model.rope_scaling_type 'ntk'")
    if model.rope_scaling_type:
        rope["factor"] = model.rope_scaling_factor
    if model.rope_scaling_type == "yarn":
        original = model.original_max_position_embeddings or model.max_position_embeddings
        rope["original_max_position_embeddings"] = original
    return rope
