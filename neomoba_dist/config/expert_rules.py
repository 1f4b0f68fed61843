"""Rules between keys that concern mixtures of experts; see rules.py."""

from collections.abc import Iterator
from typing import Final

from neomoba_dist.config.batch import nearest_multiples
from neomoba_dist.config.root import Config
from neomoba_dist.config.schema import ModelConfig

_EP: Final = "neomoba.parallel.expert_model_parallel_size"
_TP: Final = "neomoba.parallel.tensor_model_parallel_size"
_EXPERTS: Final = "neomoba.model.num_experts"


def experts(config: Config) -> Iterator[str]:
    """Refuse mixtures that are no network, and sizes that do not divide over the ranks."""
    model, ep = config.model, config.parallel.expert_model_parallel_size
    if model.num_experts == 0:
        if ep > 1:
            yield f"{_EP} {ep} shares experts, but {_EXPERTS} is 0; set {_EP} to 1, or {_EXPERTS} to {ep} or more"
        return
    if model.mlp_activation != "swiglu":
        yield (
            f"neomoba.model.mlp_activation {model.mlp_activation} is of dense layers, and experts are SwiGLU layers; "
            "set mlp_activation to swiglu, or num_experts to 0"
        )
    if model.num_experts_per_tok > model.num_experts:
        yield (
            f"neomoba.model.num_experts_per_tok {model.num_experts_per_tok} is larger than num_experts "
            f"{model.num_experts}; set it to {model.num_experts} or less"
        )
    if model.num_experts_per_tok == 1 and model.norm_topk_prob:
        yield (
            "neomoba.model.norm_topk_prob true divides the weight of the only expert by itself, so that the router "
            "learns nothing from the loss; set it to false, or num_experts_per_tok to 2 or more"
        )
    if model.num_experts % ep:
        yield (
            f"{_EXPERTS} {model.num_experts} is not a multiple of {_EP} {ep}; set {_EXPERTS} to "
            f"{nearest_multiples(model.num_experts, ep)}"
        )
    if not model.moe_layers:
        yield (
            f"neomoba.model.first_k_dense_replace {model.first_k_dense_replace} and moe_layer_frequency "
            f"{model.moe_layer_frequency} leave none of the {model.num_hidden_layers} layers to the experts; set both "
            "to smaller numbers, or num_experts to 0"
        )
    if model.moe_overflow != "drop" and model.moe_capacity_factor is None:
        yield (
            f"neomoba.model.moe_overflow {model.moe_overflow} has no effect without moe_capacity_factor; set "
            "moe_capacity_factor to 1.25, or moe_overflow to drop"
        )
    yield from _groups(model)
    yield from _tensor_parallel(config)


def _groups(model: ModelConfig) -> Iterator[str]:
    """Refuse group-limited routing that does not divide, or whose groups have too few experts."""
    if model.num_experts % model.n_group:
        yield (
            f"{_EXPERTS} {model.num_experts} is not a multiple of n_group {model.n_group}; set num_experts to "
            f"{nearest_multiples(model.num_experts, model.n_group)}"
        )
    if model.topk_group > model.n_group:
        yield (
            f"neomoba.model.topk_group {model.topk_group} is larger than n_group {model.n_group}; set it to "
            f"{model.n_group} or less"
        )
    allowed = model.topk_group * model.num_experts // model.n_group
    if allowed < model.num_experts_per_tok:
        yield (
            f"neomoba.model.topk_group {model.topk_group} of n_group {model.n_group} leaves {allowed} experts, fewer "
            f"than num_experts_per_tok {model.num_experts_per_tok}; set topk_group to {model.n_group}"
        )


def _tensor_parallel(config: Config) -> Iterator[str]:
    """Refuse experts that are not cut like everything else over tp."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    assert model.moe_intermediate_size is not None  # resolved by ModelConfig
    if model.moe_intermediate_size % tp:
        yield (
            f"neomoba.model.moe_intermediate_size {model.moe_intermediate_size} is not a multiple of {_TP} {tp}; set "
            f"it to {nearest_multiples(model.moe_intermediate_size, tp)}"
        )
    expert_tp = config.parallel.expert_tensor_parallel_size
    if expert_tp not in (None, tp):
        yield (
            f"neomoba.parallel.expert_tensor_parallel_size {expert_tp} is not {_TP} {tp}; experts are cut like the "
            f"other layers: set it to {tp}, or delete the key"
        )


def expert_engine(config: Config) -> Iterator[str]:
    """Refuse what DeepSpeed gets wrong, or asserts against, where ranks hold different experts."""
    parallel, stage = config.parallel, config.zero_stage
    ep, pp = parallel.expert_model_parallel_size, parallel.pipeline_model_parallel_size
    if ep == 1:
        return
    zero = config.deepspeed["zero_optimization"]
    for key in ("reduce_scatter", "contiguous_gradients"):
        if stage < 3 and not zero.get(key, True):
            yield f"zero_optimization.{key} false does not work in DeepSpeed with {_EP} {ep}; delete the key"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield (
            f"zero_optimization.zero_hpz_partition_size does not work with {_EP} {ep}: neighbouring ranks hold "
            "different experts; set it to 1"
        )
    for first, last in _possible_stages(config.model.num_hidden_layers, pp):
        if not any(first <= layer < last for layer in config.model.moe_layers):
            yield (
                f"neomoba.parallel.pipeline_model_parallel_size {pp} makes a stage of layers {first} to {last - 1}, "
                f"none of which has experts, and DeepSpeed hangs on it with {_EP} {ep}; set {_EP} to 1, or "
                "moe_layer_frequency and first_k_dense_replace to smaller numbers"
            )


def _possible_stages(layers: int, stages: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the shortest stages that DeepSpeed may make; where the division is even, of all."""
    size = layers // stages
    step = size if layers % stages == 0 else 1
    if size:
        yield from ((first, first + size) for first in range(0, layers - size + 1, step))
