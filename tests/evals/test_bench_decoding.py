"""`python -m evals bench decoding`: both sides compute the same, and the figures belong together; refusals."""

import json
from pathlib import Path

import pytest

from evals.__main__ import main
from neomoba_dist.errors import MISTAKE

MODEL = ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=8",
         "intermediate_size=48", "vocab_size=151", "moba_block_size=8", "moba_top_k=2")  # fmt: skip
SMALL = ["--set", *(f"neomoba.model.{key}" for key in MODEL), "--context", "80", "--repetitions", "3"]


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "decoding", *SMALL, "--prompt", "9", "--new", "10", "--output", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "decoding.json").read_text())
    context = {row["name"]: row for row in result["context"]}
    dynamic, static, full, moba = context.values()
    assert full["largest_logit"] > 0.1
    for row in (static, full):
        assert row["difference"] < 1e-4 * full["largest_logit"]
    assert moba["difference"] > 1e-3 * full["largest_logit"]  # attends to less
    assert dynamic["cache_bytes"] == static["cache_bytes"] == full["cache_bytes"] == 2 * 2 * 84 * 2 * 8 * 4
    assert full["ratio"] == min(full["seconds"]) / min(dynamic["seconds"])
    assert full["ratio_to_fastest"] == max(full["ratio"], min(full["seconds"]) / min(static["seconds"]))
    assert f"{full['ratio']:.2f}" in shown
    assert [full["goal"], moba["goal"]] == [1.0, 0.5]

    tokens = {(row["heads"], row["cached"]): row for row in result["tokens"]}
    assert all(len(row["seconds"]) == 10 and row["difference"] < 1e-4 for row in tokens.values())
    assert tokens["MHA", True]["cache_bytes"] == 2 * tokens["GQA", True]["cache_bytes"] > 0
    assert tokens["GQA", False]["cache_bytes"] == 0
    assert (tmp_path / "per_token_times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("qk_norm=false", "transformers' Qwen3 is dense, causal and has qk_norm"),
        ("attention=full", "layers must be MoBA"),
    ],
)
def test_refusals(change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decoding", *SMALL, "--set", f"neomoba.model.{change}"]) == MISTAKE
    assert message in capsys.readouterr().err
