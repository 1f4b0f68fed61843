"""Fine-tuning on responses as its users start it: tokenize_chat, then launch/pretrain.py with phase4_sft.json."""

import json
from pathlib import Path

import pytest

from launch.pretrain import load, parse_arguments
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.errors import MISTAKE
from tests.chats import shared_chats
from tests.evals.runs import make_config, write_run
from tests.programs import ROOT, run_program
from tests.runs import metrics

SFT = ROOT / "ds_configs" / "phase4_sft.json"
SMALL = [
    "neomoba.phase.sequence_length=96",
    "neomoba.phase.tokens_per_update=384",
    "neomoba.phase.steps=2",
    "neomoba.phase.warmup_steps=1",
]


def test_a_decoder_is_trained_on_with_its_own_network(tmp_path: Path) -> None:
    corpus = shared_chats()
    config = make_config(corpus, objective="clm")
    start = write_run(tmp_path / "start", config)
    keys = [*SMALL, f"neomoba.data.train={corpus}", f"neomoba.data.cache={tmp_path / 'cache'}", "bf16.enabled=false"]
    words = ["launch/pretrain.py", "--ds_config", SFT, "--set", *keys, "neomoba.log.tensorboard=false", "--init_from"]
    whole = run_program(*words, start, "--output_dir", tmp_path / "whole", timeout=240)
    assert whole.returncode == 0, whole.stderr
    assert "longer than neomoba.phase.sequence_length 96" in whole.stdout
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["neomoba"]["model"] == config.to_dict()["neomoba"]["model"]
    steps = metrics(tmp_path / "whole")
    assert all(0 < step["valid_tokens"] < 384 for step in steps)
    run_program(*words, start, "--output_dir", tmp_path / "halves", "--max_steps", 1, timeout=240)
    start.rename(tmp_path / "elsewhere")  # what a run started from it needs no more
    run_program(*words, start, "--output_dir", tmp_path / "halves", "--max_steps", 2, timeout=240)
    assert metrics(tmp_path / "halves") == steps
    encoder = write_run(tmp_path / "encoder", make_config(corpus))
    refused = run_program(*words, encoder, "--output_dir", tmp_path / "refused", timeout=240)
    assert refused.returncode == MISTAKE
    assert "neomoba.model.objective is mlm" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_run_that_goes_on_has_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder, as named or by default, and by --resume DIR; what it started from is gone."""
    config = make_config(shared_chats(), objective="clm")
    output = write_run(tmp_path / "runs" / "mine", config)
    monkeypatch.chdir(tmp_path)
    words = ["--ds_config", str(SFT), "--set", *SMALL, "--init_from", "gone"]
    for more in (["--output_dir", str(output)], ["--set", "neomoba.phase.name=mine"], ["--resume", str(output)]):
        assert load(parse_arguments([*words, *more])).model == config.model
    for more in ([], ["--output_dir", str(output), "--resume", "none"]):
        with pytest.raises(CheckpointError, match="gone: no checkpoint here"):
            load(parse_arguments([*words, *more]))
