"""The three-way comparison: equal active parameters, one command from training to table, refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from evals.__main__ import main
from evals.three_way import active_parameters, require_same, variants
from neomoba_dist.config import load_config, parse_config
from tests.runs import shared_corpus

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: ROOT / "ds_configs" / f"three_way_{name}.json" for name in ("tiny", "125m")}


@pytest.mark.parametrize("name", FILES)
def test_equal_active_parameters(name: str) -> None:
    config = load_config(FILES[name])
    models = []
    for keys in variants(config.model).values():
        tree = config.to_dict()
        tree["neomoba"]["model"] |= keys
        models.append(parse_config(tree).model)
    base, gqa, moe = models
    assert base.num_key_value_heads == base.num_attention_heads
    assert gqa.num_key_value_heads == moe.num_key_value_heads < base.num_key_value_heads
    assert (base.num_experts, gqa.num_experts, moe.num_experts) == (0, 0, 8)
    for model in (gqa, moe):
        assert active_parameters(model) == pytest.approx(active_parameters(base), rel=0.015)
    assert moe.moe_intermediate_size == config.model.moe_intermediate_size, "the file names the width that is used"


def test_one_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = shared_corpus()
    words = ["--output", str(tmp_path), "--prompt", "24", "--new", "5", "--documents", "2", "--set"]
    words += [f"neomoba.data.train={corpus}", f"neomoba.data.validation={corpus}", "neomoba.model.vocab_size=1200"]
    words += ["neomoba.phase.steps=2", "neomoba.phase.warmup_steps=1", "neomoba.log.validation_rows=4"]
    words += ["neomoba.log.tensorboard=false"]
    assert main(["ablation", "three_way", *words]) == 0
    result = json.loads((tmp_path / "three_way.json").read_text())["models"]
    assert list(result) == ["base", "gqa", "moe"]
    for figures in result.values():
        assert figures["tokens"] == 2 * 2048
        assert 6.5 < figures["validation_loss"] < 7.5
        assert figures["train_tokens_per_second"] > 0
        assert figures["decode_tokens_per_second"] > 0
    base, gqa = result["base"], result["gqa"]
    # three layers, keys and values of 2 x 29 tokens, heads of 16 float32
    assert base["cache_bytes"] == 3 * 2 * 58 * 4 * 16 * 4
    assert gqa["cache_bytes"] * 4 == base["cache_bytes"]
    assert Image.open(tmp_path / "three_way.png").size[0] > 1000
    out = capfd.readouterr().out
    assert "base + GQA + MoE" in out
    assert "validation loss" in out

    assert main(["ablation", "three_way", *words, "neomoba.phase.learning_rate=0.002"]) == 1
    error = capfd.readouterr().err
    assert f"{tmp_path / 'base'}: was trained with neomoba.phase.learning_rate 0.001, not 0.002; give" in error
    assert error.count("\n") == 1
    keys = words[words.index("--set") + 1 :]
    model = variants(load_config(FILES["tiny"], keys).model)["moe"]
    require_same(
        tmp_path / "moe", load_config(FILES["tiny"], [*keys, *(f"neomoba.model.{k}={v}" for k, v in model.items())])
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["neomoba.model.num_experts=0"], "describes no model with grouped queries and experts"),
        (["neomoba.model.num_key_value_heads=4"], "num_key_value_heads below num_attention_heads"),
        (["neomoba.model.objective=mlm"], "set neomoba.model.objective to clm"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], message: str) -> None:
    assert main(["ablation", "three_way", "--output", str(tmp_path), "--set", *keys]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["ablation", "nothing"]) == 1
    assert "choose from: three_way" in capsys.readouterr().err
