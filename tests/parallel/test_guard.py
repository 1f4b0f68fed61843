"""Ranks that were started differently, or whose weights differ, are named on all ranks before they train on."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import ConfigError, parse_config
from neomoba_dist.model.init import shard_of
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.guard import DisagreementError, odd_ranks, require_agreement, require_equal_start, weight_sums
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from neomoba_dist.train.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import build_mesh, run_config, train_here

HOST = socket.gethostname()


def _start(changes: dict[int, dict[str, Any]]) -> str:
    facts = {"neomoba": {"phase": {"learning_rate": 0.1, "steps": 4}}, "version of torch": "2.13.0"}
    try:
        require_equal_start(facts | changes.get(torch.distributed.get_rank(), {}))
    except ConfigError as error:
        return str(error)
    return ""


def test_equal_starts_pass() -> None:
    assert run_ranks(3, _start, {}) == [""] * 3


def test_a_key_that_differs_on_one_rank_is_named_on_all() -> None:
    said = run_ranks(3, _start, {1: {"neomoba": {"phase": {"learning_rate": 0.2, "steps": 4}}}})
    assert set(said) == {
        "the ranks were started differently: neomoba.phase.learning_rate is 0.1 on rank 0 "
        f"({HOST}), rank 2 ({HOST}), 0.2 on rank 1 ({HOST}); start all machines with the same files, arguments and "
        "versions"
    }


def test_everything_that_differs_is_named() -> None:
    said = run_ranks(2, _start, {0: {"version of torch": "2.11.0"}, 1: {"--resume": "must"}})[1]
    assert f'version of torch is "2.11.0" on rank 0 ({HOST}), "2.13.0" on rank 1 ({HOST}); also --resume' in said


def _agree(layout: dict[str, int], stage: int, flip: tuple[int, str] | None, model: dict[str, Any]) -> str:
    """What a rank says after a training step where a bit of one weight of one rank is turned."""
    config = run_config(layout, stage, model=model)
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    dense, experts = weight_sums(engine.module, stage)
    assert bool(dense) == (stage < 3)
    assert bool(experts) == bool(model)
    require_agreement([], engine.module, stage, mesh)
    if flip and mesh.rank == flip[0]:
        parameter = next(p for p in engine.module.parameters() if shard_of(p).name == flip[1])
        parameter.data.view(torch.int32).view(-1)[3] ^= 1
    try:
        require_agreement([], engine.module, stage, mesh)
    except DisagreementError as error:
        return str(error)
    return ""


LAYOUTS: dict[str, tuple[int, dict[str, int], int, dict[str, Any]]] = {
    "dp4": (4, {}, 1, {}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}, 1, {}),
    "pp2_cp2": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 1, {}),
    "ep2_dp4": (4, {"expert_model_parallel_size": 2}, 1, {"num_experts": 4}),
    "dp2_stage3": (2, {}, 3, {}),
}


@pytest.mark.parametrize("name", ["pp2_cp2", "dp2_stage3"])
def test_weights_of_a_new_engine_agree(name: str) -> None:
    world, layout, stage, model = LAYOUTS[name]
    assert run_ranks(world, _agree, layout, stage, None, model) == [""] * world


@pytest.mark.parametrize(("name", "rank", "others"), [("dp4", 1, [0, 2, 3]), ("tp2_dp2", 3, [1])])
def test_a_flipped_bit_names_rank_and_tensor(name: str, rank: int, others: list[int]) -> None:
    world, layout, stage, model = LAYOUTS[name]
    said = run_ranks(world, _agree, layout, stage, (rank, "blocks.1.attention.q_proj"), model)
    named = ", ".join(f"rank {other} ({HOST})" for other in others)
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"rank {rank} ({HOST}): not the weights of {named}, which must be the same in blocks.1.attention.q_proj;"
    )


def test_a_flipped_bit_of_an_expert_names_its_copy() -> None:
    world, layout, stage, model = LAYOUTS["ep2_dp4"]
    said = run_ranks(world, _agree, layout, stage, (2, "blocks.1.mlp.experts.up_proj"), model)
    assert len(set(said)) == 1
    assert said[0].startswith(f"rank 2 ({HOST}): not the weights of experts of rank 0 ({HOST}), ")


def _train_with_a_flip(output: Path) -> str:
    """A bit of rank 1's weights turns after step 2; they are compared before steps 1, 3 and 5."""
    done = Trainer._train_step

    def step(trainer: Trainer, *arguments: Any) -> dict[str, Any]:
        if trainer.step == 2 and trainer.mesh.rank == 1:
            next(trainer.engine.module.parameters()).data.view(torch.int32).view(-1)[0] ^= 1 << 20
        return done(trainer, *arguments)

    Trainer._train_step = step  # type: ignore[method-assign] - of this forked rank
    tree = run_config({}).to_dict()
    tree["neomoba"]["data"]["check_every"] = 2
    try:
        train_here(parse_config(tree), output, 6)
    except DisagreementError as error:
        return str(error)
    return ""


def test_weights_are_compared_every_n_steps(tmp_path: Path) -> None:
    said = run_ranks(2, _train_with_a_flip, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith(f"rank 1 ({HOST}): not the weights of rank 0 ({HOST}), which must be the same in embedd")
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 2


def test_most_ranks_are_right() -> None:
    assert odd_ranks([0, 0, 0, 1, 1], [5, 5, 5, 7, 7]) is None
    assert odd_ranks([0, 0, 0, 1, 1], [4, 5, 5, 7, 7]) == ([0], [1, 2])
    assert odd_ranks([0, 1, 0, 1], [4, 7, 4, 8]) == ([3], [1])
