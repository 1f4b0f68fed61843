"""6 steps = 3 steps + resume + 3 steps, bit for bit: metrics, weights, optimizer moments, position in the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

LAYOUTS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "one": (1, {}, 1, {}),
    "dp2_zero1": (2, {}, 1, {}),
    "dp2_zero2_bf16": (2, {}, 2, {"bf16": {"enabled": True}}),
    "dp3_zero3": (3, {}, 3, {"train_micro_batch_size_per_gpu": 1}),  # three ranks divide no matrix evenly
    "tp2_sp_dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 1, {}),
    "cp2_zero2": (2, {"context_parallel_size": 2, "context_parallel_moba": "route_queries"}, 2, {}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}, 1, {}),
    "ep2_zero2": (2, {"expert_model_parallel_size": 2}, 2, {}),
    "ep2_zero3": (2, {"expert_model_parallel_size": 2}, 3, {}),
    "ep2_tp2_sp": (
        4,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        1,
        {"bf16": {"enabled": True}},
    ),
    "ep2_pp2": (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, {}),
}
MOE = {
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "router_scoring": "sigmoid",
    "router_bias_update_rate": 0.01,
    "router_jitter": 0.1,  # depends on the step, which a resumed run must know
}


def folder_state(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint holds."""
    state: dict[str, Any] = {"trainer": (folder / "trainer.json").read_text()}
    for file in sorted(folder.glob("*.safetensors")):
        state.update({f"{file.name}:{name}": value for name, value in load_file(file).items()})
    return state


SLOW = ("ep2_zero2", "ep2_pp2")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in LAYOUTS]
)
def test_bit_for_bit(layout: str, tmp_path: Path) -> None:
    world, parallel, stage, deepspeed = LAYOUTS[layout]
    rows = {"tokens_per_update": 128 * 6} if world == 3 else {}
    config = run_config(parallel, stage, deepspeed=deepspeed, model=MOE if "ep" in layout else None, **rows)
    run_ranks(world, train_here, config, tmp_path / "whole", 6)
    run_ranks(world, train_here, config, tmp_path / "parts", 5)  # step 3 is saved; 4 and 5 are lost with the "crash"
    run_ranks(world, train_here, config, tmp_path / "parts", 6, tmp_path / "parts" / "checkpoints" / "step_3")
    assert {f.name for f in (tmp_path / "parts" / "checkpoints").iterdir()} == {"step_3", "step_5.abandoned", "step_6"}
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    whole, parts = (folder_state(tmp_path / run / "checkpoints" / "step_6") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert len(whole) > 3
    assert whole.pop("trainer") == parts.pop("trainer")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
        assert value.dtype == torch.float32
        assert value.abs().max() > 0, name
