"""Mixtures of experts through the DeepSpeed engines equal one process in plain torch, in float32; see test_engines.py.

Three optimizer steps at every ZeRO stage that ep allows, alone and with tp, sp and pp: loss, gradient norm, every
gradient, weights, and the biases that balance the routers.
"""

from typing import Any

import pytest

from neomoba_dist.config import Config
from tests.expert_parallel import LOSSES
from tests.parallel.test_engines import check, make_config

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 1),
    "dp2_zero2": (2, {}, 2),
    "tp2_dp2_zero3": (4, TP2, 3),
    "pp2_dense_stage": (2, PP2, 1),
    "ep2_zero1": (2, EP2, 1),
    "ep2_zero2": (2, EP2, 2),
    "ep2_zero3": (2, EP2, 3),
    "ep2_dp4_zero1": (4, EP2, 1),
    "ep2_dp4_zero3": (4, EP2, 3),
    "ep4_zero2": (4, {"expert_model_parallel_size": 4}, 2),
    "ep2_tp2_zero1": (4, {**EP2, **TP2}, 1),
    "ep2_tp2_sp_zero2": (4, {**EP2, **TP2_SP}, 2),
    "ep2_pp2": (4, {**EP2, **PP2}, 1),
    "ep2_cp2_zero2": (2, {**EP2, **CP2}, 2),
    "ep4_cp2_zero3": (4, {**CP2, "expert_model_parallel_size": 4}, 3),
    "ep2_tp2_sp_pp2": (8, {**EP2, **TP2_SP, **PP2}, 1),
    "ep2_cp2_tp2_sp_pp2": (8, {**EP2, **CP2, **TP2_SP, **PP2}, 1),
}


def moe_config(objective: str, layout: dict[str, Any], stage: int, **model: Any) -> Config:
    return make_config(objective, layout, stage, {"num_experts": 4, "moe_intermediate_size": 24, **LOSSES, **model})


SLOW = ("dp2_zero2", "tp2_dp2_zero3", "ep2_dp4_zero1", "ep2_dp4_zero3", "ep4_zero2", "ep2_tp2_zero1", "ep2_pp2")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in LAYOUTS]
)
def test_three_steps(layout: str) -> None:
    world, parallel, stage = LAYOUTS[layout]
    changes: dict[str, Any] = {"router_scoring": "sigmoid", "router_bias_update_rate": 0.01, "num_shared_experts": 1}
    if layout == "pp2_dense_stage":
        changes["first_k_dense_replace"] = 2  # without ep a stage needs no experts
    check(world, moe_config("mlm", parallel, stage, **changes))
