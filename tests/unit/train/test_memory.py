"""Out of memory: recognised, divided into parts, and told with keys that help."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.memory import OutOfMemoryError, is_out_of_memory, memory_explained, memory_parts, remedies
from tests.runs import run_config

TOO_MANY = 1 << 50  # elements; refused by every machine at once


def of_torch() -> None:
    torch.empty(TOO_MANY)


def of_python() -> None:
    raise MemoryError


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def of_a_library() -> None:
    raise RuntimeError("CUDA driver error: out of memory")


@pytest.mark.parametrize("raises", [of_torch, of_python, of_a_gpu, of_a_library])
def test_out_of_memory_is_one_line_with_parts_and_three_keys(raises: Callable[[], None]) -> None:
    with pytest.raises(OutOfMemoryError) as caught, memory_explained(run_config({}), Mesh.single()):
        raises()
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("out of memory on rank 0 (")
    for part in ("weights 0.00 GiB", "gradients", "optimizer", "activations and the rest so far"):
        assert part in said
    assert said.endswith(
        'lower train_micro_batch_size_per_gpu from 2 to 1, or set neomoba.phase.recompute to "selective", or raise '
        "zero_optimization.stage from 1 to 2"
    )


def test_other_errors_stay_as_they_are() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shape"), memory_explained(run_config({}), Mesh.single()):
        raise RuntimeError("shape mismatch")


def test_only_keys_that_can_be_changed_are_named() -> None:
    config = run_config({}, 3, recompute="full")
    assert remedies(config, Mesh.single())[1:] == [
        "raise neomoba.parallel.context_parallel_size from 1",
        "raise neomoba.parallel.tensor_model_parallel_size from 1",
    ]
    phase = replace(config.phase, compile="cuda_graphs")
    deepspeed = {**config.deepspeed, "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    assert remedies(replace(config, phase=phase, deepspeed=deepspeed), Mesh.single()) == [
        'set neomoba.phase.compile to "auto"',
        f"lower neomoba.phase.sequence_length from {phase.sequence_length}",
    ]


@pytest.mark.parametrize(
    ("layout", "stage", "deepspeed", "bytes_per_parameter"),
    [
        ({}, 1, {}, (4, 4, 12 / 4)),
        ({}, 2, {"bf16": {"enabled": True}}, (2, 4 / 4, 12 / 4)),
        ({}, 1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, (2, 2, 12 / 4)),
        ({}, 3, {}, (4 / 4, 4 / 4, 12 / 4)),
        ({"tensor_model_parallel_size": 2}, 1, {}, (4, 4, 12 / 2)),
    ],
)
def test_parts_by_stage(
    layout: dict[str, int], stage: int, deepspeed: dict[str, Any], bytes_per_parameter: tuple[float, ...]
) -> None:
    config: Config = run_config(layout, stage, deepspeed=deepspeed)
    mesh = Mesh.place(config.parallel, 4, 1)
    with torch.device("meta"):
        local = Mesh({**Mesh.single().axes, "tp": mesh["tp"]}, device=torch.device("meta"))
        parameters = sum(p.numel() for p in NeoBERT(config.model, local).parameters())
    found = list(memory_parts(config, mesh).values())
    assert found[:3] == pytest.approx([size * parameters for size in bytes_per_parameter], rel=1e-2)
    assert found[3] > 0
