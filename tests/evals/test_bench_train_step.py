"""`bench train_step --peer` and `bench layouts`: everybody trains the same, and the figures belong together."""

import json
from pathlib import Path

import pytest

from evals.__main__ import main
from neomoba_dist.errors import MISTAKE
from tests.programs import run_program

MODEL = ("num_hidden_layers=2", "hybrid_layer_count=0", "hidden_size=32", "num_attention_heads=4",
         "num_key_value_heads=2", "intermediate_size=48", "vocab_size=151")  # fmt: skip
SMALL = ["--ds-config", "ds_configs/phase1.json", "--micro-batches", "2", "--set", "bf16.enabled=false",
         *(f"neomoba.model.{key}" for key in MODEL), "neomoba.phase.sequence_length=32",
         "train_micro_batch_size_per_gpu=2"]  # fmt: skip


@pytest.mark.parametrize(("peer", "goal"), [("plain", 0.97), ("hf", 1.1)])
def test_the_peer_trains_the_same(peer: str, goal: float, tmp_path: Path) -> None:
    words = ["-m", "evals", "bench", "train_step", *SMALL, "--peer", peer, "--steps", "3", "--output", tmp_path]
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "phase1.json").read_text())["comparison"]
    ours, theirs = found["losses"]["ours"], found["losses"][peer]
    assert len(ours) == len(theirs) == 4
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert ours[-1] < ours[0] - 0.01
    assert found["goal"] == goal
    seconds = {name: min(times) for name, times in found["seconds"].items()}
    assert found["ratio"] == pytest.approx(seconds[peer] / seconds["ours"])
    assert f"{found['ratio']:.3f}" in done.stdout


def test_a_plain_loop_in_bf16_is_refused() -> None:
    done = run_program("-m", "evals", "bench", "train_step", *SMALL, "bf16.enabled=true", "--peer", "plain")
    assert (done.returncode, done.stderr.splitlines()[-1][:22]) == (MISTAKE, "error: --peer plain: a")


@pytest.mark.full
def test_layouts_train_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "layouts", *SMALL, "--steps", "1", "--rounds", "1", "--output", str(tmp_path)]
    assert main(words) == 0
    rows = {row["layout"]: row for row in json.loads((tmp_path / "layouts.json").read_text())["rows"]}
    alone = rows.pop("one rank")
    assert list(rows) == ["tp 2", "dp 2", "pp 2"]
    assert alone["received"] == {}
    for row in rows.values():
        assert row["of_ranks"] == row["tokens_per_second"] / (2 * alone["tokens_per_second"])
        assert row["received"]
    for name in ("tp 2", "pp 2"):
        assert rows[name]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert rows["dp 2"]["loss"] == pytest.approx(alone["loss"], rel=0.02)  # its ranks have the same half of the rows
    assert rows["tp 2"]["received"]["tp"] > rows["pp 2"]["received"]["pp"] > 0
    assert "dp_cp" in rows["dp 2"]["received"]
    assert "of two" in capsys.readouterr().out
