"""Every DeepSpeed key that the configuration accepts runs, at another value than its default, and changes no result."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from neomoba_dist.config import parse_config
from neomoba_dist.config.deepspeed_keys import DEEPSPEED_KEYS
from neomoba_dist.config.types import Refused
from tests.parallel.test_engines import check, make_config

PP = {"pipeline_model_parallel_size": 2}
OFFLOAD = {"device": "cpu", "pin_memory": False}
BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "use_multi_rank_bucket_allreduce": False}
STAGE_1_AND_2 = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "overlap_comm": True,
    "allgather_partitions": False,
    "parameter_alignment": True,
    "ignore_unused_parameters": False,
}
STAGE_3_FETCH = {
    "sub_group_size": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "overlap_comm": False,
    "reduce_scatter": False,
}
STAGE_3_OTHER = {
    "stage3_use_all_reduce_for_fetch_params": True,
    "zero_hpz_partition_size": 2,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
}
LOGS = {
    "steps_per_print": 1,
    "log_level": "info",
    "disable_python_gc": True,
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_reduce"], "debug": True},
}
PROFILE = {
    "wall_clock_breakdown": True,
    "flops_profiler": {
        "enabled": True,
        "recompute_fwd_factor": 1.0,
        "profile_step": 2,
        "module_depth": 1,
        "top_modules": 2,
        "detailed": False,
        "output_file": "/dev/null",
    },
}
DTYPES = {
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "bf16": {"enabled": False, "check_grad_overflow": True},
    "fp16": {
        "enabled": False,
        "loss_scale": 2,
        "initial_scale_power": 4,
        "loss_scale_window": 3,
        "hysteresis": 1,
        "consecutive_hysteresis": True,
        "min_loss_scale": 2,
    },
}
DUMPS = {"memory_breakdown": True, "dump_state": True}  # slow: they walk all tensors at every stage of an update

# name, layout, ZeRO stage, keys of zero_optimization, keys of the root
FAST: list[tuple[str, dict[str, int | bool], int, dict[str, Any], dict[str, Any]]] = [
    ("stage 1", {}, 1, {**STAGE_1_AND_2, **BUCKETS}, {**LOGS, **DTYPES}),
    ("stage 2", {}, 2, {**STAGE_1_AND_2, **BUCKETS}, PROFILE),
    ("stage 2 offload", {}, 2, {"offload_optimizer": OFFLOAD}, {}),
    ("stage 3 fetch", {}, 3, STAGE_3_FETCH, DTYPES),
    ("stage 3 other", {}, 3, STAGE_3_OTHER, {}),
    ("stage 3 sequential", {}, 3, {"stage3_allgather_sequential": True}, PROFILE),
    ("stage 3 offload", {}, 3, {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}, {}),
    ("pipeline", PP, 1, {**STAGE_1_AND_2, **BUCKETS}, {**LOGS, **DTYPES}),
    ("pipeline offload", PP, 1, {"offload_optimizer": OFFLOAD}, {}),
]
SLOW: list[tuple[str, dict[str, int | bool], int, dict[str, Any], dict[str, Any]]] = [
    ("dumps", {}, 1, {}, DUMPS),
    ("dumps in a pipeline", PP, 1, {}, DUMPS),
]
GIVEN_BY_EVERY_RUN = {
    "zero_optimization",
    "zero_optimization.stage",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",  # both derived, and checked against what is stated
    "train_batch_size",
    "gradient_clipping",
}


def run(layout: dict[str, int | bool], stage: int, zero: dict[str, Any], root: dict[str, Any]) -> None:
    tree = make_config("clm", layout, stage).to_dict()
    tree["zero_optimization"] |= copy.deepcopy(zero)
    check(2, parse_config({**tree, **copy.deepcopy(root)}))


@pytest.mark.parametrize(("layout", "stage", "zero", "root"), [case[1:] for case in FAST], ids=[c[0] for c in FAST])
def test_options_change_no_result(
    layout: dict[str, int | bool], stage: int, zero: dict[str, Any], root: dict[str, Any]
) -> None:
    run(layout, stage, zero, root)


@pytest.mark.full
@pytest.mark.parametrize(("layout", "stage", "zero", "root"), [case[1:] for case in SLOW], ids=[c[0] for c in SLOW])
def test_slow_options_change_no_result(
    layout: dict[str, int | bool], stage: int, zero: dict[str, Any], root: dict[str, Any]
) -> None:
    run(layout, stage, zero, root)


def test_every_accepted_key_is_among_the_options() -> None:
    tried = set(GIVEN_BY_EVERY_RUN)
    for _, _, _, zero, root in FAST + SLOW:
        tried |= set(dotted({"zero_optimization": zero, **root}))
    assert set(dotted(DEEPSPEED_KEYS)) == tried


def dotted(block: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted path of every key that is not refused."""
    for name, node in block.items():
        if not isinstance(node, Refused):
            yield ".".join((*path, name))
        if isinstance(node, dict):
            yield from dotted(node, (*path, name))
