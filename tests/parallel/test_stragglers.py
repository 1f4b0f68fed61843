"""The rank that keeps the others waiting is named, by its own work and not by what it waits."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neomoba_dist.config import Config
from neomoba_dist.parallel.ledger import Entry
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train import stragglers, trainer
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from neomoba_dist.train.stragglers import ForwardTimer, Stragglers, straggler_line
from tests.ranks import run_ranks
from tests.runs import run_config, train_here


def test_own_collectives_and_evaluation_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stragglers, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    mesh = Mesh.single()

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] += 5.0
            mesh.ledger.entries.setdefault(("cp", "all_gather"), Entry()).seconds += 2.0
            return x

    layer = Layer()
    timer = ForwardTimer(layer, mesh)
    for _ in range(2):
        layer(torch.zeros(1))
        now[0] += 100.0
    layer.eval()(torch.zeros(1))
    assert timer.take() == 6.0
    assert timer.take() == 0.0


def test_means_and_share() -> None:
    mesh = Mesh.single()
    axes = {**mesh.axes, "world": SimpleNamespace(size=3)}
    found = Stragglers(Mesh(axes, rank=1))  # type: ignore[arg-type]
    assert found.part(2.5) == [0.0, 2.5, 0.0]
    found.add([1.0, 2.0, 1.5], 4.0)
    found.add([1.0, 4.0, 2.5], 6.0)
    entry = found.entry()
    assert entry == {"rank_seconds": [1.0, 3.0, 2.0], "slowest_rank": 1, "slowest_rank_share": 0.6}
    assert straggler_line(entry).endswith("median 2.000 s, slowest rank 1 3.000 s, 60% of the step")
    found.add([9.0, 1.0, 1.0], 10.0)
    assert found.entry()["slowest_rank"] == 0


def slow_rank(config: Config, output: Path) -> str:
    """Rank 1 seems to need 1000 seconds more for every step."""
    trainer.EVERY = 2
    take = ForwardTimer.take

    def slow(self: ForwardTimer) -> float:
        own = take(self)
        assert own >= 0.0
        return own + 1000.0 * self.mesh.rank

    ForwardTimer.take = slow  # type: ignore[method-assign]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_here(config, output, 5)
    return said.getvalue()


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["dp2", "pp2"])
def test_the_slow_rank_is_named(layout: dict[str, Any], tmp_path: Path) -> None:
    said, _ = run_ranks(2, slow_rank, run_config(layout), tmp_path)
    log = read_metrics(tmp_path / METRICS_FILE)
    assert [entry.get("slowest_rank") for entry in log] == [None, 1, None, 1, None]
    for entry in log[1::2]:
        fast, slow = entry["rank_seconds"]
        assert 0.0 < fast < 1000.0 <= slow
        assert entry["slowest_rank_share"] > 0.0
    lines = [line for line in said.splitlines() if line.startswith("own work of the ranks per step (data, forward): ")]
    assert len(lines) == 2
    assert "slowest rank 1 100" in lines[0]
