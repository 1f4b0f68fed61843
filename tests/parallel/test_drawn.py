"""A rank draws what it holds and nothing else; under ZeRO-3 it never holds the model whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neomoba_dist.config import Config
from neomoba_dist.model import init
from neomoba_dist.train.engines import build_engine
from tests.parallel.test_engines import make_config
from tests.ranks import run_ranks
from tests.runs import build_mesh


def drawn_rank(config: Config) -> tuple[int, int, int]:
    """Numbers drawn, elements that the optimizer of this rank holds, and those of the parameters in its model."""
    drawn, normal = [], init.normal

    def counted(number: torch.Tensor, key: int, std: float) -> torch.Tensor:
        drawn.append(number.numel())
        return normal(number, key, std)

    init.normal = counted  # type: ignore[attr-defined]
    engine = build_engine(config, config.plan(torch.distributed.get_world_size()), build_mesh(config))
    local = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]
    return sum(drawn), sum(fragment.numel for fragment in engine.fragments()), sum(local)


@pytest.mark.parametrize(
    ("world", "layout", "stage"),
    [(4, {}, 3), (2, {"tensor_model_parallel_size": 2}, 1), (2, {"pipeline_model_parallel_size": 2}, 1)],
)
def test_a_rank_draws_its_own_part(world: int, layout: dict[str, Any], stage: int) -> None:
    found = run_ranks(world, drawn_rank, make_config("mlm", layout, stage))
    for drawn, held, local in found:
        own = held if stage == 3 else local
        assert 0.9 * own < drawn < 1.1 * own + 4000  # norms are ones; stretches begin and end within rows
    if stage == 3:
        assert found[0][0] < 0.4 * found[0][2]
