"""Muon equals its formula in one process, and every layout through the engines equals that; see test_engines.py."""

import functools
import math
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config, parse_config
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.muon import Muon, orthogonalise, scaled_update
from tests.equivalence import Pieces, assemble, state_pieces
from tests.parallel.test_engines import LAYOUTS, RATE, check, make_config, updates
from tests.parallel.test_expert_engines import BALANCED, moe_config
from tests.parallel.test_expert_engines import LAYOUTS as EXPERT_LAYOUTS
from tests.ranks import run_ranks
from tests.reference_muon import near_one
from tests.runs import build_mesh, metrics, run_config, train_here

ALL: dict[str, tuple[int, dict[str, int | bool], int]] = {"one": (1, {}, 1), "dp4_zero2": (4, {}, 2), **LAYOUTS}
QUICK = {
    ("one", "mlm"),
    ("dp2_zero1", "clm"),
    ("dp4_zero2", "mlm"),
    ("dp2_zero3", "clm"),
    ("tp2_zero1", "mlm"),
    ("tp4_sp_zero1", "clm"),  # more ranks than KV heads: k and v are held whole by each
    ("pp2", "clm"),
    ("cp2_zero2", "mlm"),
    ("tp2_sp_pp2", "mlm"),
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (1, 7)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    torch.testing.assert_close(orthogonalise(matrix).double(), near_one(matrix), rtol=0, atol=2e-5)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert 0.6 < values.median() < values.max() + 1e-6 < 1.3
    assert scaled_update(matrix).norm() == pytest.approx(0.2 * math.sqrt(max(shape)) * float(values.norm()), rel=1e-5)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_a_step_is_that_of_torch() -> None:
    """torch.optim.Muon, which iterates in bfloat16."""
    generator = torch.Generator().manual_seed(4)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    matrix = Muon([{"params": [ours], "weight_decay": 0.1, "orthogonalised": True}], Mesh.single(), list, lr=0.1)
    matrix._matrices = lambda flat, group: Whole()  # type: ignore[method-assign,assignment]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(24, 40, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        matrix.step()
        reference.step()
        assert (ours - theirs).norm() < 2e-2 * (theirs - 1).norm()
    assert set(matrix.state[ours]) == {"step", "exp_avg"}


class Whole:
    """A partition that is one whole matrix."""

    def replace(self, flat: torch.Tensor, compute: Any) -> None:
        flat.copy_(compute(flat))


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        pytest.param(layout, objective, marks=() if (layout, objective) in QUICK else pytest.mark.full)
        for layout in ALL
        for objective in ("mlm", "clm")
    ],
)
def test_three_steps(layout: str, objective: str) -> None:
    world, parallel, stage = ALL[layout]
    check(world, make_config(objective, parallel, stage, optimizer="muon"))


@pytest.mark.parametrize(
    "layout",
    [name if name == "ep2_tp2_zero1" else pytest.param(name, marks=pytest.mark.full) for name in EXPERT_LAYOUTS],
)
def test_three_steps_with_experts(layout: str) -> None:
    world, parallel, stage = EXPERT_LAYOUTS[layout]
    dense = {"first_k_dense_replace": 2} if layout == "pp2_dense_stage" else {}
    check(world, with_muon(moe_config("mlm", parallel, stage, **BALANCED, **dense)))


def with_muon(config: Config, **zero: Any) -> Config:
    tree = config.to_dict()
    tree["neomoba"]["phase"]["optimizer"] = "muon"
    tree["zero_optimization"] |= zero
    return parse_config(tree)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["dp2_zero1", "dp2_zero2", "dp2_zero3", "pp2"])
def test_offload(layout: str) -> None:
    world, parallel, stage = LAYOUTS[layout]
    check(world, with_muon(make_config("mlm", parallel, stage), **OFFLOAD))


def bf16_rank(config: Config) -> tuple[list[float], Pieces]:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    dp = mesh["dp"]
    losses = [engine.update(batches[dp.index :: dp.size], RATE).loss for batches in updates("mlm")]
    return losses, state_pieces(engine, "model")


def test_bf16_ranks_hold_one_set_of_weights() -> None:
    world, parallel, stage = LAYOUTS["tp2_sp_pp2"]
    config = parse_config({**with_muon(make_config("mlm", parallel, stage)).to_dict(), "bf16": {"enabled": True}})
    results = run_ranks(world, bf16_rank, config)
    assert len({tuple(losses) for losses, _ in results}) == 1
    assert all(value.dtype == torch.float32 for value in assemble([found for _, found in results]).values())


def shared_rank(config: Config) -> tuple[int, int, bool, bool]:
    """Matrices that this rank makes whole, of all; whether those of a partition come back; who has which moments."""
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    engine.update(updates("mlm")[0][mesh["dp"].index :: mesh["dp"].size], RATE)
    assert isinstance(engine.optimizer, Muon)
    ((flat, matrices),) = engine.optimizer._whole.items()
    seen: list[torch.Tensor] = []
    copy = flat.detach().clone()
    matrices.replace(copy, functools.partial(noted, seen))
    moments = [set(state) for state in engine.engine.optimizer.optimizer.state.values()]
    kinds = sorted(moments, key=len) == [{"step", "exp_avg"}, *[{"step", "exp_avg", "exp_avg_sq"}] * (len(moments) - 1)]
    return len(seen), sum(map(len, (turn.owned for turn in matrices.rounds))), torch.equal(copy, flat), kinds


def noted(seen: list[torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    seen.append(matrix)
    return matrix.clone()


def test_ranks_share_the_work() -> None:
    """21 matrices over tp 2 x dp 2: each whole on one rank alone, and never more than one rank's share on any."""
    world, parallel, _ = LAYOUTS["tp2_sp_dp2_zero2"]
    results = run_ranks(world, shared_rank, with_muon(make_config("mlm", parallel, 2)))
    assert sum(count for count, *_ in results) == 21
    assert max(count for count, *_ in results) == math.ceil(21 / 4)
    assert all(same and kinds for _, _, same, kinds in results)


def test_the_loss_falls(tmp_path: Any) -> None:
    """Eight updates on real text, from the loss of a uniform guess."""
    run_ranks(1, train_here, run_config({}, optimizer="muon", steps=20, checkpoint={"save_every": 20}), tmp_path, 8)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] > math.log(1200) - 0.1
    assert losses[-1] < losses[0] - 0.6
