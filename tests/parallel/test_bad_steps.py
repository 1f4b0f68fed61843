"""A step that is refused leaves no trace: good, bad, good is good, good, bit for bit, in every layout.

Bad: a gradient that is not finite on one rank alone, a loss that is not finite on one rank alone, and a judge who
objects to numbers that are finite.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from neomoba_dist.config import Config, parse_config
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engine import Engine, UpdateResult
from neomoba_dist.train.engines import build_engine
from tests.equivalence import Pieces, assemble, assert_same, state_pieces
from tests.parallel.test_engines import LAYOUTS, RATE, make_config, plain_loop, reference, updates
from tests.ranks import run_ranks
from tests.runs import build_mesh

KINDS = ("model", "exp_avg", "exp_avg_sq")


def poison_gradient(engine: Engine) -> Callable[[], None]:
    """The last block's output on this rank gets one gradient that is not finite."""

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = math.nan
        return gradient

    block = engine.layer_statistics.blocks[-1]
    return block.register_forward_hook(lambda module, given, output: void(output[0].register_hook(poison))).remove


def poison_loss(engine: Engine) -> Callable[[], None]:
    """The loss that this rank reports is not finite; all gradients are."""
    return engine.module.register_forward_hook(lambda *unused: void(engine._loss_sum.fill_(math.inf))).remove


def void(unused: object) -> None:
    """A hook that returns nothing changes nothing."""


def outcome(config: Config, mesh: Mesh, bad: int | None, how: str) -> tuple[list[UpdateResult], dict[str, Pieces]]:
    """Three updates of which number `bad` is poisoned on the last rank; with None that one is left out."""
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    last = mesh.rank == mesh["world"].size - 1
    results = []
    for number, batches in enumerate(updates(config.model.objective)):
        if bad is None and number == int(how):
            continue
        judge: dict[str, Any] = {}
        undo: Callable[[], None] | None = None
        if number == bad:
            if how == "judge":
                judge = {"judge": lambda loss, norm: "no"}
            elif last:
                undo = (poison_gradient if how == "gradient" else poison_loss)(engine)
        results.append(engine.update(batches[mesh["dp"].index :: mesh["dp"].size], RATE, **judge))
        if undo:
            undo()
    buffers = [(spec, value.clone()) for spec, value in saved_buffers(engine.module)]
    return results, {**{kind: state_pieces(engine, kind) for kind in KINDS}, "buffers": buffers}


def train_rank(config: Config, bad: int) -> tuple[list[str | None], list[float], Pieces]:
    """What was said of the bad steps, the losses without them, the final weights."""
    mesh = build_mesh(config)
    good, expected = outcome(config, mesh, None, str(bad))
    assert all(result.problem is None for result in good)
    problems = []
    for how in ("gradient", "loss", "judge"):
        results, state = outcome(config, mesh, bad, how)
        problems.append(results[bad].problem)
        kept = [result for number, result in enumerate(results) if number != bad]
        assert [(r.loss, r.grad_norm, r.problem) for r in kept] == [(r.loss, r.grad_norm, None) for r in good], how
        for kind, found in state.items():
            for (spec, value), (same, wanted) in zip(found, expected[kind], strict=True):
                assert spec == same
                assert torch.equal(value, wanted), (how, kind, spec.name)
    return problems, [result.loss for result in good], expected["model"]


EXPERTS = {"num_experts": 4, "router_scoring": "sigmoid", "router_bias_update_rate": 0.01}
CASES: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "one": (1, {}, 1, {}),
    **{name: (*LAYOUTS[name], {}) for name in ("dp2_zero1", "dp2_zero2", "dp2_zero3", "tp2_zero1", "pp2", "cp2_zero2")},
    "ep2_zero2": (2, {"expert_model_parallel_size": 2}, 2, {}),
    "dp2_zero1_bf16": (2, {}, 1, {"bf16": {"enabled": True}}),
    "dp2_zero2_bf16_checked": (2, {}, 2, {"bf16": {"enabled": True, "check_grad_overflow": True}}),
    "dp2_zero3_bf16": (2, {}, 3, {"bf16": {"enabled": True}}),
    "pp2_bf16": (2, {"pipeline_model_parallel_size": 2}, 1, {"bf16": {"enabled": True}}),
    "dp2_zero2_offload": (2, {}, 2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "dp2_zero2_offload_bf16": (
        2,
        {},
        2,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}},
    ),
    "dp2_zero2_offload_bf16_checked": (
        2,
        {},
        2,
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "bf16": {"enabled": True, "check_grad_overflow": True},
        },
    ),
    "dp2_zero3_offload": (2, {}, 3, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
}


SLOW = ("dp2_zero1_bf16", "pp2_bf16", "cp2_zero2", "dp2_zero3_offload")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in CASES]
)
def test_a_skipped_step_leaves_no_trace(layout: str) -> None:
    world, parallel, stage, deepspeed = CASES[layout]
    model = EXPERTS if layout.startswith("ep") else None
    config = parse_config({**make_config("mlm", parallel, stage, model).to_dict(), **deepspeed})
    bad = 0 if layout == "dp2_zero2" else 1  # AdamW has no state yet
    results = run_ranks(world, train_rank, config, bad)
    for problems, *_ in results:
        assert problems == results[0][0], "the ranks decide alike"
        assert "nan" in problems[0]
        assert "inf" in problems[1] or "nan" in problems[1]
        assert problems[2] == "no"
    if config.dtype_name == "float32":
        losses, _, _, weights = plain_loop(config, False, steps=[step for step in range(3) if step != bad])
        assert results[0][1] == pytest.approx(losses, rel=2e-4)
        found = assemble([r[2] for r in results])
        assert_same(found, {name: weights[name] for name in found}, rtol=2e-4)


def search_scale(config: Config) -> tuple[list[tuple[bool, bool, float]], list[float]]:
    """(overflow, problem, loss scale after it) of steps whose gradient is not finite, then the norms of two good ones.

    fp16's loss scaler in float32: it works alike.
    """
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    scaler = DynamicLossScaler(4.0, 1000, 1.0, 1, False, raise_error_at_min_scale=False, dtype=torch.float32)
    engine.engine.optimizer.loss_scaler = scaler
    mine = [batches[mesh["dp"].index :: mesh["dp"].size] for batches in updates("mlm")]
    norms = [engine.update(mine[0], RATE).grad_norm]
    undo = poison_loss(engine)  # which no loss scale makes better
    result = engine.update(mine[1], RATE)
    assert (result.overflow, result.problem is not None, scaler.cur_scale) == (False, True, 4.0)
    undo()
    undo = poison_gradient(engine)
    found = []
    for _ in range(3):
        result = engine.update(mine[1], RATE)
        found.append((result.overflow, result.problem is not None, scaler.cur_scale))
    undo()
    return found, [*norms, engine.update(mine[1], RATE).grad_norm]


@pytest.mark.parametrize("stage", [2, 3])
def test_only_a_loss_scale_that_can_fall_excuses_an_overflow(stage: int) -> None:
    config = make_config("mlm", {}, stage)
    for found, norms in run_ranks(2, search_scale, config):
        assert found == [(True, False, 2.0), (True, False, 1.0), (False, True, 1.0)]
        assert norms == pytest.approx(reference(config, False)[1][:2], rel=1e-5)  # unscaled


def resume_scale(config: Config) -> tuple[list[float], list[float], float]:
    """Loss scales after five updates of which the first overflows: of a run, of one that resumes, and of one that does
    so from a checkpoint that knows the scale alone, at its start."""
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)

    def start_scaler() -> None:
        scaler = DynamicLossScaler(4.0, 3, 1.0, 2, False, raise_error_at_min_scale=False, dtype=torch.float32)
        engine.engine.optimizer.loss_scaler = scaler

    def scales(*overflows: bool) -> list[float]:
        found = []
        for overflow in overflows:
            undo = poison_gradient(engine) if overflow else lambda: None
            engine.update(updates("mlm")[0], RATE)
            undo()
            found.append(engine.loss_scale())
        return found

    start_scaler()
    scales(False, True)  # the next overflow halves the scale
    state = json.loads(json.dumps({"loss_scale": engine.loss_scale(), "loss_scaler": engine.loss_scaler()}))
    undisturbed = scales(True, False, False, False, False)
    start_scaler()
    engine.load_loss_scaler(state)
    resumed = scales(True, False, False, False, False)
    start_scaler()
    engine.load_loss_scaler({"loss_scale": 2.0})
    return undisturbed, resumed, engine.loss_scale()


def test_a_loss_scale_goes_on_where_it_was_saved() -> None:
    ((undisturbed, resumed, earlier),) = run_ranks(1, resume_scale, make_config("mlm", {}, 1))
    assert undisturbed == resumed == [2.0, 2.0, 2.0, 2.0, 4.0]
    assert earlier == 2.0


def moments_rank(config: Config, scaled: bool) -> Pieces:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    if scaled:  # doubled after every step but the first
        scaler = DynamicLossScaler(4.0, 1, 1.0, 1, False, raise_error_at_min_scale=False, dtype=torch.float32)
        engine.engine.optimizer.loss_scaler = scaler
    for batches in updates("mlm"):
        engine.update(batches[mesh["dp"].index :: mesh["dp"].size], RATE)
    assert engine.loss_scale() == (16.0 if scaled else 1.0)
    return state_pieces(engine, "exp_avg")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_is_divided_by_the_scale_that_its_loss_had(stage: int) -> None:
    """Also where the scale grows with the step."""
    config = parse_config({**make_config("mlm", {}, stage).to_dict(), "gradient_clipping": 0.0})
    plain, scaled = (assemble(run_ranks(2, moments_rank, config, scaled)) for scaled in (False, True))
    assert_same(scaled, plain, rtol=1e-6)
