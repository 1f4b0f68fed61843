"""`neomoba.phase.recompute: auto` takes what fits the smallest device, on every rank alike."""

import pytest
import torch.distributed as dist

from neomoba_dist.config import Config
from neomoba_dist.model.block import Block
from neomoba_dist.train import recompute
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.planner import Planner
from neomoba_dist.train.rehearsal import largest_batches
from neomoba_dist.train.step_plan import Machine
from tests.ranks import run_ranks
from tests.runs import build_mesh, run_config

SMALL = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}


def _ways(config: Config, memory: list[int]) -> set[str]:
    """What the blocks of this rank recompute, where rank r has `memory[r]` bytes."""
    rank = dist.get_rank()
    recompute.device_memory = lambda mesh: memory[rank]  # type: ignore[assignment]
    engine = build_engine(config, config.plan(dist.get_world_size()), build_mesh(config))
    engine.update(largest_batches(config, engine.plan), 1e-3)
    return {block.recompute for block in engine.module.modules() if isinstance(block, Block)}


@pytest.mark.parametrize(("smallest", "way"), [("large", "none"), ("middle", "full"), ("tiny", "full")])
def test_it_fits_the_smallest_device(smallest: str, way: str) -> None:
    config = run_config({"tensor_model_parallel_size": 2}, deepspeed=SMALL, recompute="auto")
    planner = Planner(2, Machine(), "cpu")
    needed = {
        name: planner.layout(
            run_config({"tensor_model_parallel_size": 2}, deepspeed=SMALL, recompute=name)
        ).memory.total
        for name in ("none", "full")
    }
    assert needed["full"] < needed["none"]
    sizes = {"large": needed["none"] * 2, "middle": round(needed["full"] * 1.01 / 0.9), "tiny": 1000}
    assert run_ranks(2, _ways, config, [needed["none"] * 2, sizes[smallest]]) == [{way}, {way}]
