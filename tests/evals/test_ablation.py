"""Ablations: the shipped grids, a grid from training to table and picture, going on, refusals."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals import ablation
from evals.__main__ import main
from evals.grid import grid_names, read_grid
from neomoba_dist.config import load_config
from neomoba_dist.errors import MISTAKE
from tests.programs import ROOT, run_program
from tests.runs import shared_corpus

SETTINGS = ["neomoba.phase.steps=2", "neomoba.phase.warmup_steps=1", "neomoba.log.validate_every=1"]
SETTINGS += ["neomoba.phase.tokens_per_update=512", "neomoba.log.validation_rows=4"]
SETTINGS += ["neomoba.log.tensorboard=false", "neomoba.model.vocab_size=1200"]


@pytest.mark.parametrize("name", grid_names())
def test_shipped_grids_load(name: str) -> None:
    grid = read_grid(name)
    assert set(grid.sizes) == {"tiny", "125m"}
    for size in grid.sizes.values():
        models = []
        for arm in size.arms:
            for _, words in ablation.make_cell(Path("x"), size, arm, size.seeds[0], []).phases:
                config = load_config(size.ds_config, words)
                assert config.plan(1).gradient_accumulation_steps >= 1
                assert config.data.validation is not None
            models.append((config.to_dict()["neomoba"]["model"], config.phase))
        assert all(model != other for i, model in enumerate(models) for other in models[:i]), "arms differ"
        if size.evaluate:
            assert size.evaluate[0] == "--tasks"
        for metric in size.metrics:
            assert "." in metric.key or metric.key in (*ablation.RUN_METRICS, "decode_tokens_per_second", "cache_bytes")
            assert f"{0.5:{metric.form}}"


@pytest.mark.parametrize("size", ["tiny", "125m"])
def test_the_three_ways_have_equal_active_parameters(size: str) -> None:
    grid = read_grid("three_way").size(size)
    configs = [
        load_config(grid.ds_config, ablation.make_cell(Path("x"), grid, arm, 1, []).phases[0][1]) for arm in grid.arms
    ]
    base, gqa, moe = (config.model for config in configs)
    assert base.num_key_value_heads == base.num_attention_heads
    assert gqa.num_key_value_heads == moe.num_key_value_heads < base.num_key_value_heads
    assert (base.num_experts, gqa.num_experts, moe.num_experts) == (0, 0, 8)
    active = [ablation.active_parameters(config) for config in configs]
    assert active[1:] == pytest.approx([active[0]] * 2, rel=0.015)


def grid_file(folder: Path, **changes: Any) -> Path:
    """A grid of two arms, two seeds and two phases of two steps."""
    size = {
        "ds_config": "cpu_tiny_clm.json",
        "set": {"neomoba.model.num_hidden_layers": 2},
        "phases": [{"neomoba.phase.sequence_length": 128}, {"neomoba.phase.sequence_length": 256}],
        "seeds": [1, 2],
        "arms": {"full attention": {"neomoba.model.attention": "full"}, "MoBA": {}},
        "evaluate": ["--tasks", "position_loss", "--length", "256", "--rows", "2"],
        "decode": {"prompt": 24, "new": 5, "documents": 2},
        "metrics": [
            {"label": "loss, nats", "key": "position_loss.loss"},
            {"label": "cache, bytes", "key": "cache_bytes", "form": ",.0f"},
        ],
        **changes,
    }
    file = folder / "small.json"
    file.write_text(json.dumps({"question": "Which?", "sizes": {"tiny": size}}))
    return file


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run in forked processes; returns them as they come."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        result = run_program(*command[1:])
        print(result.stdout, result.stderr)
        return result

    monkeypatch.setattr(ablation.subprocess, "run", run)
    return commands


def test_a_grid(tmp_path: Path, forked: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    corpus = shared_corpus()
    data = [f"neomoba.data.train={corpus}", f"neomoba.data.validation={corpus}"]
    output = tmp_path / "out"
    words = ["ablation", str(grid_file(tmp_path)), "--output", str(output), "--set", *data, *SETTINGS]
    assert main([*words, "--part", "2/2"]) == 0
    assert len(forked) == 2 * 3, "two phases and an evaluation each"
    runs = sorted(folder.parent.relative_to(output) for folder in output.glob("*/*/*/evals"))
    assert [str(run) for run in runs] == ["MoBA/2/phase2", "full_attention/2/phase2"], "every second run"
    assert not list(output.glob("small.*"))
    assert main(words) == 0
    assert len(forked) == 2 * 3 + 2 * 2 * 3, "those of the part end at once"
    result = json.loads((output / "small.json").read_text())
    assert result["question"] == "Which?"
    assert list(result["arms"]) == ["full attention", "MoBA"]
    for arm, found in result["arms"].items():
        assert len(found) == 2
        assert found[0]["position_loss.loss"] != found[1]["position_loss.loss"], "seeds differ"
        for run in found:
            own = "full" if arm == "full attention" else "moba"
            assert 6.5 < run["position_loss.loss"] == run[f"position_loss_{own}.loss"] < 7.5
            assert run["tokens"] == 2 * 512, "of the last phase"
            assert run["cache_bytes"] == 2 * 2 * 58 * 2 * 16 * 4, "two layers, keys and values of 2 x 29 tokens"
    lines = list(csv.DictReader((output / "small.csv").open()))
    assert [(line["arm"], line["seed"]) for line in lines] == [
        ("full attention", "1"), ("full attention", "2"), ("MoBA", "1"), ("MoBA", "2"),
    ]  # fmt: skip
    assert Image.open(output / "small.png").size[0] > 1000
    out = capfd.readouterr().out
    assert "loss, difference to the first" in out
    assert "+0.00 %" in out

    times = {file: file.stat().st_mtime_ns for file in output.rglob("model*.safetensors")}
    assert main(words) == 0, "finished cells are left alone"
    assert {file: file.stat().st_mtime_ns for file in output.rglob("model*.safetensors")} == times
    assert (
        json.loads((output / "small.json").read_text())["arms"]["MoBA"][0]["position_loss.loss"]
        == (result["arms"]["MoBA"][0]["position_loss.loss"])
    )
    capfd.readouterr()

    assert main([*words, "neomoba.phase.learning_rate=0.002"]) == MISTAKE
    error = capfd.readouterr().err
    assert "was trained with neomoba.phase.learning_rate 0.001, not 0.002; give another --output" in error
    assert error.count("\n") == 1


def test_the_mean_its_spread_and_the_difference() -> None:
    from evals.grid import Grid

    found = {"one": [{"loss": 2.0, "hit": 0.5}, {"loss": 4.0, "hit": 0.5}], "two": [{"loss": 3.3}, {"loss": 3.3}]}
    metrics = [Grid.Metric("loss, nats", "loss", ".2f"), Grid.Metric("found", "hit", ".0%")]
    assert ablation.table(found, metrics) == [
        ["", "loss, nats", "found", "loss, difference to the first"],
        ["one", "3.00 ± 1.41", "50% ± 0%", "+0.00 %"],
        ["two", "3.30 ± 0.00", "", "+10.00 %"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "sizes.tiny.arms is empty"),
        ({"arm": {}}, "no key arm is known"),
        ({"seeds": 3}, "seeds is no list"),
        ({"arms": {"one": 3}}, "arms.one is no object"),
        ({"metrics": [{"label": "loss"}]}, "key is missing"),
        ({"arms": {"one": {"neomoba.model.hidden": 3}}}, "neomoba.model.hidden"),
        ({"set": {"neomoba.model.objective": "mlm"}}, "set neomoba.model.objective to clm"),
    ],
)
def test_bad_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str) -> None:
    assert main(["ablation", str(grid_file(tmp_path, **changes)), "--output", str(tmp_path / "out")]) == MISTAKE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablation", "nothing", "--output", str(tmp_path)]) == MISTAKE
    assert "choose from: block_size, " in capsys.readouterr().err
    for bad in ("0/2", "3/2", "2", "a/b"):
        assert main(["ablation", "top_k", "--output", str(tmp_path), "--part", bad]) == MISTAKE
        assert f"{bad!r} is not I/N with I from 1 to N, as in 2/8" in capsys.readouterr().err
    assert main(["ablation", "top_k", "--size", "7b", "--output", str(tmp_path)]) == MISTAKE
    assert "choose from: tiny, 125m" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert main(["ablation", str(tmp_path / "bad.json"), "--output", str(tmp_path)]) == MISTAKE
    assert "bad.json: cannot be read" in capsys.readouterr().err
    assert read_grid("three_way").sizes["tiny"].ds_config == ROOT / "ds_configs" / "three_way_tiny.json"
