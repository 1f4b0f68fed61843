"""launch/pretrain.py on two ranks that were not started alike: all end at once, with one line that says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job import Job
from tests.runs import run_config


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [("phase", "learning_rate", 0.02), ("parallel", "tensor_model_parallel_size", 2), ("phase", "seed", 1)],
)
def test_another_configuration_on_one_rank_is_named(tmp_path: Path, block: str, key: str, value: Any) -> None:
    tree: dict[str, Any] = run_config({}).to_dict()
    config, other = tmp_path / "config.json", tmp_path / "other.json"
    config.write_text(json.dumps(tree))
    usual = tree["neomoba"][block][key]
    tree["neomoba"][block][key] = value
    other.write_text(json.dumps(tree))
    job = Job(config, tmp_path / "run", other)
    try:
        assert job.codes(30) == [2, 2], job.said()
    finally:
        job.end()
    assert len(job.errors_said()) == 1, job.said()
    said = job.errors_said()[0]
    assert said.startswith(f"error: the ranks were started differently: neomoba.{block}.{key} is {usual} on rank 0 (")
    assert f"), {value} on rank 1 (" in said
    assert "Traceback" not in job.said()
