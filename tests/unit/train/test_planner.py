"""The planner: what it proposes loads, fits and says why the rest does not; its numbers add up."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch import plan
from neomoba_dist.config import Config, ConfigError, load_config, parse_config
from neomoba_dist.model.init import views_of
from neomoba_dist.parallel.mesh import Axis
from neomoba_dist.train.checkpoint_plan import stage_module
from neomoba_dist.train.distill_plan import PlannedTeacher
from neomoba_dist.train.muon import Matrix, busiest_flops, in_rounds, matrices_of, orthogonalise
from neomoba_dist.train.planner import Planner, parameter_counts, settings
from neomoba_dist.train.step_plan import Machine, update_flops

CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"
GIB = 2**30
AXES = "neomoba.parallel"


def phase3(*changes: str) -> Config:
    return load_config(CONFIGS / "phase3.json", ["neomoba.phase.recompute=full", *changes])


@pytest.mark.parametrize(
    ("name", "stage", "recompute", "measured"),
    [("phase1", 1, "none", 23.0), ("phase2", 1, "none", 23.0), ("phase3", 2, "full", 9.1)],
)  # GiB on one H100: docs/benchmarks.md
def test_memory_measured_on_a_gpu(name: str, stage: int, recompute: str, measured: float) -> None:
    as_then = ["neomoba.model.intermediate_size=3072", 'data_types.grad_accum_dtype="bf16"']
    as_then += [f"zero_optimization.stage={stage}", "zero_optimization.reduce_bucket_size=500000000"]
    as_then += [f"neomoba.phase.recompute={recompute}"]
    config = load_config(CONFIGS / f"{name}.json", as_then)
    tokens = 8 * config.micro_batch_size * config.phase.sequence_length
    config = replace(config, phase=replace(config.phase, tokens_per_update=tokens))
    total = Planner(1, Machine()).layout(config).memory.total
    if recompute != "full":  # then layers kept copies of their weights, q | k | v and gate | up
        model = config.model
        rows = 2 * model.intermediate_size + model.hidden_size * 5 // 3  # four KV heads for twelve
        total += 2 * model.num_hidden_layers * rows * model.hidden_size
    assert total / GIB == pytest.approx(measured, rel=0.02)


def test_graphs_keep_memory_for_each_kind_of_step() -> None:
    """An input, an output and their gradients of every block, and its weights' gradients."""
    planner, graphs = Planner(1, Machine()), ["neomoba.phase.recompute=none", "neomoba.phase.compile=cuda_graphs"]
    plain, one, two = (
        planner.layout(phase3(*settings, f"neomoba.phase.full_attention_fraction={fraction}")).memory
        for settings, fraction in ((graphs[:1], 0), (graphs, 0), (graphs, 0.1))
    )
    model = phase3().model
    hidden = 2 * phase3().micro_batch_size * phase3().phase.sequence_length * model.hidden_size
    rows = 3 * model.intermediate_size + model.hidden_size * 8 // 3 + 2  # four KV heads for twelve; two norms
    elements = model.num_hidden_layers * rows * model.hidden_size
    assert two.activations - one.activations == 4 * model.num_hidden_layers * hidden + 2 * elements
    assert one.activations - plain.activations > 3 * model.num_hidden_layers * hidden
    assert (two.weights, two.optimizer) == (plain.weights, plain.optimizer)


def test_proposals_load_fit_and_come_in_order(tmp_path: Path) -> None:
    planner, budget = Planner(16, Machine()), 20 * GIB
    search = planner.best(phase3(), budget)
    assert len(search.layouts) > 10
    assert search.large == 0
    for layout in search.layouts:
        assert layout.memory.total <= budget
        assert planner.layout(parse_config(settings(layout.config))) == layout
    fastest = min(layout.step.seconds for layout in search.layouts)
    close = [layout for layout in search.layouts if layout.step.seconds <= 1.05 * fastest]
    assert search.layouts[: len(close)] == close
    axes = [[size for size in dataclasses.astuple(layout.config.parallel)[:3] if size > 1] for layout in close]
    assert axes == sorted(axes, key=lambda sizes: (len(sizes), math.prod(sizes)))
    seconds = [layout.step.seconds for layout in search.layouts[len(close) :]]
    assert seconds == sorted(seconds)
    assert close
    assert seconds
    assert len({layout.config.parallel for layout in search.layouts}) == len(search.layouts)


def test_less_memory_takes_recomputation_and_then_nothing_fits() -> None:
    planner = Planner(8, Machine())
    ways = []
    for size in (70, 6):
        found = planner.best(phase3(), size * GIB).layouts
        ways.append(next(layout.config.phase.recompute for layout in found if layout.plan.data_parallel_size == 8))
    assert ways == ["none", "full"]
    search = planner.best(phase3(), 0.5 * GIB)
    assert search.layouts == []
    assert search.large > 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([f"{AXES}.tensor_model_parallel_size=3"], "num_key_value_heads 4 neither divides nor is a multiple of"),
        ([f"{AXES}.context_parallel_size=5"], "64 ranks are not a multiple of"),
        (["zero_optimization.offload_optimizer.device=cpu"], "a plan knows no offload"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Planner(64, Machine()).layout(phase3(*changes))


def test_seconds_follow_from_the_rates() -> None:
    config = load_config(CONFIGS / "scale_7b.json")
    step, faster = (Planner(64, Machine(peak=peak)).layout(config).step for peak in (1e15, 2e15))
    assert faster.compute == pytest.approx(step.compute / 2)
    assert faster.communication == step.communication
    plan = config.plan(64)
    assert step.bubble == pytest.approx(3 / (plan.gradient_accumulation_steps + 3))
    assert step.mfu == pytest.approx(step.flops / (step.seconds * 64 * 1e15))
    slow = Planner(64, Machine(peak=1e15, network=1e9)).layout(config).step
    eager = replace(config, phase=replace(config.phase, compile=False))  # measured once: docs/benchmarks.md
    assert step.compute / Planner(64, Machine(peak=1e15)).layout(eager).step.compute == pytest.approx(0.816, abs=1e-3)
    assert slow.communication["tp"] == step.communication["tp"], "8 tensor-parallel ranks are in one machine"
    assert slow.communication["dp_cp"] > step.communication["dp_cp"]


def test_a_teacher_adds_its_forward_pass_and_its_weights() -> None:
    config, student = phase3(), phase3("neomoba.model.num_hidden_layers=6")
    alone = Planner(8, Machine()).layout(student)
    taught = Planner(8, Machine(), teacher=PlannedTeacher(config)).layout(student)
    assert alone.step.teacher_flops == sum(alone.teacher) == 0
    assert taught.step.flops == alone.step.flops
    sparse = replace(config, phase=replace(config.phase, full_attention_fraction=0.0))
    assert taught.step.teacher_flops == pytest.approx(update_flops(sparse, config.plan(8)) / 3)
    more = taught.step.teacher_flops / (8 * 989e12 * 0.5)
    assert taught.step.compute == pytest.approx(alone.step.compute + more)
    assert taught.teacher.weights == pytest.approx(2 * parameter_counts(config)[0], rel=0.01)
    assert taught.memory.weights == alone.memory.weights + taught.teacher.weights
    other = replace(config, model=replace(config.model, vocab_size=100), source="--teacher runs/other")
    with pytest.raises(ConfigError, match="--teacher runs/other: its vocab_size is 100"):
        Planner(8, Machine(), teacher=PlannedTeacher(other)).layout(student)


def test_a_missing_teacher_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ds_config", str(CONFIGS / "distill.json"), "--teacher", str(tmp_path), "--gpus", "8"]
    assert plan.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"neomoba.distill.teacher: {tmp_path}: no checkpoint here" in said


def test_muon_takes_the_time_of_its_busiest_rank() -> None:
    config = phase3("neomoba.phase.optimizer=muon")
    matrices = [
        matrix
        for part in stage_module(config, Axis(), Axis(), Axis()).parameters()
        for spec, _ in views_of(part)
        if spec.name.endswith("_proj")
        for matrix in matrices_of(spec)
    ]
    alone, many = (Planner(ranks, Machine()).layout(config) for ranks in (1, 64))
    assert alone.step.muon_flops == sum(matrix.flops for matrix in matrices)
    rounds = in_rounds(matrices, 64)
    assert len(rounds) == 4
    assert many.step.muon_flops == sum(turn[0].flops for turn in rounds)
    plain = Planner(64, Machine()).layout(phase3())
    assert plain.step.muon_flops == plain.step.muon == plain.muon_memory == 0
    assert many.step.muon == pytest.approx(many.step.muon_flops / (0.5 * 495e12))
    rest = many.step.compute + many.step.muon + sum(many.step.communication.values())
    assert many.step.seconds == pytest.approx(rest)
    exact = Planner(64, Machine()).layout(phase3("neomoba.phase.optimizer=muon", "neomoba.phase.allow_tf32=false"))
    assert exact.step.muon == pytest.approx(many.step.muon_flops / (0.5 * 67e12))


def test_ranks_of_tp_share_what_is_cut_and_repeat_what_is_not() -> None:
    whole, cut = Matrix("k", 0, (64, 128), (64, 128)), Matrix("q", 0, (128, 128), (64, 128))
    assert busiest_flops([whole, cut], ranks=1, tp=2) == whole.flops + cut.flops
    assert busiest_flops([cut, cut], ranks=1, tp=2) == cut.flops
    assert busiest_flops([whole, whole], ranks=1, tp=2) == 2 * whole.flops
    assert busiest_flops([cut] * 5, ranks=2, tp=2) == 2 * cut.flops


@pytest.mark.parametrize("shape", [(96, 256), (256, 96)])
def test_operations_of_one_matrix(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.randn(shape))
    assert counter.get_total_flops() == Matrix("", 0, shape, shape).flops


def test_parameters_of_a_mixture() -> None:
    config = load_config(CONFIGS / "phase3_moe.json")
    total, active = parameter_counts(config)
    model = config.model
    matrices = 3 * model.hidden_size * model.moe_intermediate_size * len(model.moe_layers)
    assert total - active == matrices * (model.num_experts - model.num_experts_per_tok)


def test_every_kind_of_rank_can_be_built() -> None:
    config = load_config(
        CONFIGS / "scale_1b.json", [f"{AXES}.tensor_model_parallel_size=4", "zero_optimization.stage=1"]
    )
    config = replace(config, parallel=replace(config.parallel, pipeline_model_parallel_size=2))
    sizes = Planner(4096, Machine()).build(config)
    assert set(sizes) == {(tp, pp, 0) for tp in range(4) for pp in range(2)}
