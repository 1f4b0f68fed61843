"""Router biases balance the experts on real text, and the report shows it."""

from pathlib import Path

import pytest

from evals.__main__ import main
from evals.layer_plots import expert_loads
from evals.runs import read_run
from tests.ranks import run_ranks
from tests.runs import run_config, train_here


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_biases_balance_within_300_steps(tmp_path: Path) -> None:
    model = {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "router_scoring": "sigmoid",
        "router_bias_update_rate": 0.005,
        "router_aux_loss_coef": 0.0,
    }
    config = run_config({}, model=model, steps=300, learning_rate=1e-3, warmup_steps=20, tokens_per_update=2048)
    run_ranks(1, train_here, config, tmp_path / "run", 300, timeout=1500)
    run = read_run(tmp_path / "run")
    assert expert_loads(run).max() - 1 < 0.5  # over the last ten updates, every layer
    assert max(max(entry["max_violation"]) for entry in run.steps[20:60]) > 1, "it was not balanced from the start"
    assert main(["report", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "<h2>Experts</h2>" in (tmp_path / "report.html").read_text()
