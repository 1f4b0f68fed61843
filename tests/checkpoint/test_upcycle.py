"""A dense checkpoint as the start of a mixture of experts: the same function at first, in any layout; refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader, load_model, load_weights
from neomoba_dist.checkpoint.upcycle import UpcycledReader, difference
from neomoba_dist.config import Config
from neomoba_dist.model.init import views_of
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engines import build_engine
from tests.equivalence import Pieces, assemble, pieces, state_pieces
from tests.models import tiny_batch
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

MOE = {"num_experts": 4, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "router_scoring": "sigmoid"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training step of a dense model with tp 2."""
    output = tmp_path_factory.mktemp("dense")
    run_ranks(2, train_here, run_config({"tensor_model_parallel_size": 2}), output, 1)
    return output


def test_the_mixture_computes_what_the_dense_model_did(dense: Path) -> None:
    config = run_config({}, model=MOE)
    model = NeoBERT(config.model, Mesh.single(), seed=7)
    load_weights(UpcycledReader(dense, config), model)
    original, _ = load_model(dense)
    batch = tiny_batch(0, vocab_size=1200)
    torch.testing.assert_close(model(batch)[0], original(batch)[0], rtol=1e-5, atol=0)
    _, (_, up) = views_of(original.blocks[1].mlp.gate_up_proj)
    experts = model.blocks[1].mlp.experts.up_proj
    assert all(torch.equal(expert, up) for expert in experts)
    router = model.blocks[1].mlp.router.weight
    assert float(router.detach().std()) == pytest.approx(config.model.initializer_range, rel=0.2)
    fresh = NeoBERT(config.model, Mesh.single(), seed=config.phase.seed)
    assert torch.equal(router, fresh.blocks[1].mlp.router.weight)


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        ({}, ""),
        ({"moe_capacity_factor": 1.25, "moe_overflow": "reroute"}, ""),
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"moe_capacity_factor": 0.5}, "moe_capacity_factor leaves experts out"),
    ],
)
def test_where_it_does_not_a_line_says_so(dense: Path, changes: dict[str, Any], causes: str) -> None:
    # two sigmoids of small logits would add up to about one by themselves
    config = run_config({}, model={**MOE, "router_scoring": "softmax", **changes})
    line = difference(config.model)
    assert line is None if not causes else line.startswith("warning: --upcycle") and line.endswith(causes)
    model = NeoBERT(config.model, Mesh.single(), seed=7)
    load_weights(UpcycledReader(dense, config), model)
    original, _ = load_model(dense)
    batch = tiny_batch(0, vocab_size=1200)
    same = model(batch)[0].isclose(original(batch)[0], rtol=1e-5)
    assert bool(same) == (not causes)


def load_on_rank(config: Config, folder: Path) -> Pieces:
    engine = build_engine(config, config.plan(dist.get_world_size()), Mesh.build(config.parallel))
    engine.load(UpcycledReader(folder, config), moments=False)
    return state_pieces(engine, "model")


def test_every_rank_reads_its_part(dense: Path) -> None:
    parallel = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    config = run_config(parallel, model=MOE)
    single = NeoBERT(config.model, Mesh.single())
    load_weights(UpcycledReader(dense, config), single)
    loaded = assemble(run_ranks(4, load_on_rank, config, dense))
    for name, value in assemble([pieces(single, "data")]).items():
        assert torch.equal(loaded[name], value), name


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 0}, "neomoba.model.num_experts is 0"),
    (
        {"moe_intermediate_size": 24},
        "is not the checkpoint's intermediate_size 48, and experts start as copies",
    ),
    ({"num_shared_experts": 1}, "set neomoba.model.num_shared_experts to 0"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_misfits_are_refused(dense: Path, changes: dict[str, Any], message: str) -> None:
    config = run_config({}, model=MOE)
    with pytest.raises(CheckpointError) as caught:
        UpcycledReader(dense, replace(config, model=replace(config.model, **changes)))
    assert message in str(caught.value)
    with pytest.raises(CheckpointError, match="becomes a mixture of experts with --upcycle"):
        load_weights(CheckpointReader(dense), NeoBERT(config.model, Mesh.single()))
