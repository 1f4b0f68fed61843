"""`launch/convert.py --plan`: the files that it foretells are those that are written, byte by byte."""

from pathlib import Path
from typing import Any

import pytest

from launch.convert import main
from neomoba_dist.errors import MISTAKE
from neomoba_dist.train.checkpoint_plan import plan_checkpoint, standard_config
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

MOE = {"num_experts": 4, "moe_intermediate_size": 24, "router_bias_update_rate": 0.01, "num_shared_experts": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "one": (1, {}, 1, {}),
    "dp3_zero3": (3, {}, 3, {}),
    "tp2_dp2_zero2": (4, {"tensor_model_parallel_size": 2}, 2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, {}),
    "pp2_dp2_tied": (4, {"pipeline_model_parallel_size": 2}, 1, {"tie_word_embeddings": True}),
    "tp2_dp2_muon": (4, {"tensor_model_parallel_size": 2}, 1, {}),
    "ep2_cp2_zero3": (4, {"expert_model_parallel_size": 2, "context_parallel_size": 2}, 3, MOE),
    "ep2_tp2": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}, 1, MOE),
    "ep2_pp2": (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, MOE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_foretold_and_written(name: str, tmp_path: Path) -> None:
    world, layout, stage, model = LAYOUTS[name]
    rows = {"train_micro_batch_size_per_gpu": 1}
    phase: dict[str, Any] = {"tokens_per_update": 128 * 6} if world == 3 else {}
    if name.endswith("muon"):
        phase["optimizer"] = "muon"
    config = run_config(layout, stage, model=model, deepspeed=rows, **phase)
    run_ranks(world, train_here, config, tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    plan = plan_checkpoint(config, world)
    assert plan.files == {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    written = {file.name: file.stat().st_size for file in folder.glob("*.json")}
    assert {name: size for name, size in plan.json.items() if "rank-" not in name} == {
        name: written[name] for name in ("index.json", "manifest.json")
    }


@pytest.mark.parametrize(("shape", "world"), [("7B", 300), pytest.param("70B", 1024, marks=pytest.mark.full)])
def test_no_table_and_no_folder_is_too_large(shape: str, world: int) -> None:
    plan = plan_checkpoint(standard_config(shape, {}, 3), world)
    assert sum(plan.written) == pytest.approx(12 * plan.parameters, rel=1e-3)
    assert max(plan.json.values()) < 20e6
    assert plan.most_files_in_a_folder < 1000


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ds_configs/phase3.json", "--plan", "--world_size", "8", "64"]) == 0
    said = capsys.readouterr().out
    assert "5 GB/s per machine" in said
    assert [line.split()[2] for line in said.splitlines()[2:]] == ["8", "64"]
    assert main(["--verify"]) == MISTAKE
    assert "name a run folder or a step_N folder" in capsys.readouterr().err
