"""The rules on mixtures of experts, and that the values the messages name do work."""

import re
from typing import Any

import pytest

from neomoba_dist.config import ConfigError
from tests.configs import build

MODEL, PARALLEL = "neomoba.model", "neomoba.parallel"
EP, TP = f"{PARALLEL}.expert_model_parallel_size", f"{PARALLEL}.tensor_model_parallel_size"
PP, STAGE = f"{PARALLEL}.pipeline_model_parallel_size", "zero_optimization.stage"
MOE: dict[str, Any] = {f"{MODEL}.num_experts": 8, f"{MODEL}.moe_intermediate_size": 512}

BROKEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [  # set beside MOE, what the line says, what mends it
    (
        {f"{MODEL}.num_experts": 0, EP: 2},
        f"{EP} 2 shares experts, but neomoba.model.num_experts is 0; set {EP} to 1",
        {EP: 1},
    ),
    (
        {f"{MODEL}.mlp_activation": "gelu"},
        "neomoba.model.mlp_activation gelu is of dense layers",
        {f"{MODEL}.mlp_activation": "swiglu"},
    ),
    (
        {f"{MODEL}.num_experts_per_tok": 9},
        "neomoba.model.num_experts_per_tok 9 is larger than num_experts 8; set it to 8 or less",
        {f"{MODEL}.num_experts_per_tok": 8},
    ),
    (
        {f"{MODEL}.num_experts_per_tok": 1},
        "neomoba.model.norm_topk_prob true divides the weight of the only expert by itself",
        {f"{MODEL}.norm_topk_prob": False},
    ),
    ({EP: 3}, f"num_experts 8 is not a multiple of {EP} 3; set neomoba.model.num_experts to 6 or 9", {EP: 4}),
    (
        {f"{MODEL}.first_k_dense_replace": 28},
        "neomoba.model.first_k_dense_replace 28 and moe_layer_frequency 1 leave none of the 28 layers",
        {f"{MODEL}.first_k_dense_replace": 27},
    ),
    (
        {f"{MODEL}.moe_overflow": "reroute"},
        "neomoba.model.moe_overflow reroute has no effect without moe_capacity_factor; set moe_capacity_factor to 1.25",
        {f"{MODEL}.moe_capacity_factor": 1.25},
    ),
    ({f"{MODEL}.n_group": 3}, "8 is not a multiple of n_group 3; set num_experts to 6 or 9", {f"{MODEL}.n_group": 4}),
    (
        {f"{MODEL}.n_group": 2, f"{MODEL}.topk_group": 3},
        "neomoba.model.topk_group 3 is larger than n_group 2; set it to 2 or less",
        {f"{MODEL}.topk_group": 2},
    ),
    (
        {f"{MODEL}.n_group": 8},
        "topk_group 1 of n_group 8 leaves 1 experts, fewer than num_experts_per_tok 2; set topk_group to 8",
        {f"{MODEL}.topk_group": 8},
    ),
    (
        {f"{MODEL}.moe_intermediate_size": 511, TP: 2},
        f"moe_intermediate_size 511 is not a multiple of {TP} 2; set it to 510 or 512",
        {f"{MODEL}.moe_intermediate_size": 512},
    ),
    (
        {f"{PARALLEL}.expert_tensor_parallel_size": 1, TP: 2},
        f"expert_tensor_parallel_size 1 is not {TP} 2; experts are cut like the other layers: set it to 2, or delete",
        {f"{PARALLEL}.expert_tensor_parallel_size": 2},
    ),
    ({EP: 2, STAGE: 2, "zero_optimization.reduce_scatter": False}, "optimization.reduce_scatter false", {EP: 1}),
    ({EP: 2, "zero_optimization.contiguous_gradients": False}, "contiguous_gradients false does not work", {EP: 1}),
    (
        {EP: 2, STAGE: 3, "zero_optimization.zero_hpz_partition_size": 2},
        f"zero_hpz_partition_size does not work with {EP} 2",
        {"zero_optimization.zero_hpz_partition_size": 1},
    ),
    (
        {EP: 2, PP: 4, f"{MODEL}.first_k_dense_replace": 7},
        "pipeline_model_parallel_size 4 makes a stage of layers 0 to 6, none of which has experts",
        {f"{MODEL}.first_k_dense_replace": 6},
    ),
    (
        {EP: 2, PP: 5, f"{MODEL}.moe_layer_frequency": 9},
        "makes a stage of layers 1 to 5, none of which has experts",
        {EP: 1},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "mended"), BROKEN)
def test_refused_with_one_line(changes: dict[str, Any], message: str, mended: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build({**MOE, **changes})
    assert str(caught.value).startswith("FILE: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    build({**MOE, **changes, **mended})


def test_allowed() -> None:
    build({**MOE, TP: 2, STAGE: 3})  # without ep, experts are like other weights
    build({**MOE, EP: 8, STAGE: 3})
    build({**MOE, EP: 2, TP: 4, PP: 7, f"{PARALLEL}.expert_tensor_parallel_size": 4})
    assert build({f"{MODEL}.num_experts": 4}).model.moe_intermediate_size == 3072
    assert build({}).model.moe_intermediate_size is None


def test_ep_divides_the_ranks_of_data_and_context() -> None:
    config = build({**MOE, EP: 4, TP: 2})
    assert config.plan(8).data_parallel_size == 4
    with pytest.raises(ConfigError) as caught:
        build({**MOE, EP: 4, TP: 2, "neomoba.phase.tokens_per_update": 384}).plan(12)
    message = str(caught.value)
    assert f"{EP} 4 does not divide the 6 ranks of data and context parallelism; set it to 3" in message
    assert [int(n) for n in re.findall(r"start (.*) ranks", message)[0].split(" or ")] == [8, 16]
