"""What is logged of the experts: the numbers, TensorBoard, and the warning on starved ones."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neomoba_dist.train.expert_metrics import STARVED_STEPS, StarvationWatch, routing_entry
from neomoba_dist.train.flops import feed_forward_weights
from neomoba_dist.train.metrics import METRICS_FILE, RunLog
from tests.configs import build
from tests.models import tiny_model


def test_routing_entry() -> None:
    config = tiny_model(num_experts=4, num_hidden_layers=3, first_k_dense_replace=1)
    routing = torch.tensor([[10.0, 0, 0, 12, 5, 5, 5, 5], [10.0, 4, 2, 20, 16, 0, 0, 0]], dtype=torch.float64)
    entry = routing_entry(routing, config)
    assert entry["tokens_per_expert"] == [[5, 5, 5, 5], [16, 0, 0, 0]]
    assert entry["kl_to_uniform"] == pytest.approx([0.0, math.log(4)])
    assert entry["max_violation"] == pytest.approx([0.0, 3.0])
    assert entry["router_entropy"] == pytest.approx([1.2, 2.0])
    assert (entry["dropped_choices"], entry["rerouted_choices"]) == (4, 2)
    nothing = routing_entry(torch.zeros(2, 8, dtype=torch.float64), config)
    assert nothing["kl_to_uniform"] == [0.0, 0.0]


def test_a_starving_expert_is_told_of_once() -> None:
    config = tiny_model(num_experts=4, first_k_dense_replace=1)
    watch = StarvationWatch(config)
    fed, hungry = [[10, 10, 10, 10]] * 2, [[10, 10, 10, 10], [19, 20, 0, 1]]
    told = [watch.warnings(hungry) for _ in range(STARVED_STEPS - 1)]
    assert not any(told)
    assert not watch.warnings(fed)
    told = [watch.warnings(hungry) for _ in range(2 * STARVED_STEPS)]
    assert [len(lines) for lines in told] == [0] * (STARVED_STEPS - 1) + [1] + [0] * STARVED_STEPS
    assert told[STARVED_STEPS - 1][0].startswith("warning: layer 2: expert 2 got less than 5% of its fair share")
    assert StarvationWatch(tiny_model()).layers == ()


def test_run_log(tmp_path: Path) -> None:
    config = build({"neomoba.model.num_experts": 4, "neomoba.model.first_k_dense_replace": 26})
    routing = torch.tensor([[10.0, 0, 0, 12, 5, 5, 5, 5], [10.0, 4, 2, 20, 16, 0, 0, 0]], dtype=torch.float64)
    entry = {
        "phase": "p",
        "loss": 1.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 1.0,
        "step_seconds": 1.0,
        "full_attention": True,
        "skipped": False,
        "skipped_steps": 0,
        "activation_rms": [1.0] * 27 + [2.0],
        **routing_entry(routing, config.model),
    }
    log = RunLog(tmp_path, config, 0, 1)
    log.step({"step": 1, **entry})
    log.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text())["tokens_per_expert"] == [[5, 5, 5, 5], [16, 0, 0, 0]]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("max_violation/layer_27")[0].value == pytest.approx(3.0)
    assert events.Scalars("activation_rms/layer_27")[0].value == 2.0
    bars = events.Histograms("tokens_per_expert/layer_26")[0].histogram_value
    assert list(bars.bucket) == [5, 5, 5, 5]


def test_of_a_hundred_layers_some_are_shown(tmp_path: Path) -> None:
    """In an even choice, in the order of their names; metrics.jsonl has them all."""
    config = build({"neomoba.model.num_hidden_layers": 100})
    entry = {"phase": "p", "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1.0, "step_seconds": 1.0}
    log = RunLog(tmp_path, config, 0, 1)
    skipped = {"skipped": False, "skipped_steps": 0}
    log.step({"step": 1, **entry, **skipped, "full_attention": True, "activation_rms": list(range(100))})
    log.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text())["activation_rms"] == list(range(100))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = sorted(name for name in events.Tags()["scalars"] if name.startswith("activation_rms/"))
    assert len(names) == 16
    shown = [int(events.Scalars(name)[0].value) for name in names]
    assert names == [f"activation_rms/layer_{layer:02d}" for layer in shown]
    assert (shown[0], shown[-1]) == (0, 99)
    assert set(np.diff(shown)) <= {6, 7}


def test_active_weights() -> None:
    dense = tiny_model()
    assert feed_forward_weights(dense) == 3 * 3 * 32 * 48
    sparse = replace(dense, num_experts=8, moe_intermediate_size=16, num_shared_experts=1, first_k_dense_replace=1)
    assert feed_forward_weights(sparse) == 3 * 32 * 48 + 2 * (8 * 32 + 3 * 3 * 32 * 16)
