"""A model of BERT's parts with dropout goes on from its checkpoint: bit for bit, and alike in one process, whose
micro-batches are larger."""

from pathlib import Path
from typing import Any

from tests.checkpoint.test_layouts import assert_goes_on
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

MODEL: dict[str, Any] = {"norm": "layernorm", "norm_placement": "post", "mlp_activation": "gelu", "dropout": 0.2}


def test_it_goes_on(tmp_path: Path) -> None:
    axes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    config = run_config(axes, model=MODEL)
    run_ranks(4, train_here, config, tmp_path / "whole", 6)
    assert_goes_on(tmp_path / "whole", tmp_path / "same", config, 4, same=True)
    one = run_config({}, deepspeed={"train_micro_batch_size_per_gpu": 4}, model=MODEL)
    assert_goes_on(tmp_path / "whole", tmp_path / "one", one, 1, same=False)
