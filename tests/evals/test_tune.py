"""Tuning without a GPU: a clock that says what it is told, the table that is written, and what reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import evals.__main__ as program
from evals.bench.tune import Clocks, Variant, cells, fastest
from neomoba_dist.model.attention.kernels import choice, tuned
from neomoba_dist.model.attention.kernels.choice import Call, MobaCall, full_attention_kernel, moba_kernel
from neomoba_dist.model.attention.kernels.tuned import full_key, moba_key, write_table

GPU = torch.device("cuda", 0)
BY_ATOMICS = [32, 16, 4, 1, False, True]


def clock(seconds: dict[str, float]) -> Clocks:
    return Clocks(lambda works: {name: seconds[name] for name in works}, lambda work: 3 << 20)


def variant(choice: Any, *values: float) -> Variant:
    return Variant(choice, lambda: (torch.tensor(values),))


def test_the_fastest_that_agrees_is_chosen() -> None:
    def fails() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of shared memory\nat line 3")

    variants = [
        variant("built-in", 1.0, 100.0),
        variant([64, 64, 4, 3], 1.01, 100.0),
        variant("wrong", 6.0, 100.0),
        variant("damaged", float("nan"), 100.0),
        Variant("broken", fails),
    ]
    found = fastest("key", variants, clock({"built-in": 3.0, "[64, 64, 4, 3]": 2.0, "wrong": 1.0, "damaged": 1.0}))
    assert found.fastest == [64, 64, 4, 3]
    assert found.seconds == {"built-in": 3.0, "[64, 64, 4, 3]": 2.0}
    assert found.left_out["broken"] == "RuntimeError: out of shared memory"
    assert found.left_out["wrong"] == "result 0 differs by 5"
    assert "nan" in found.left_out["damaged"]
    assert found.peak_bytes == {"built-in": 3 << 20, "[64, 64, 4, 3]": 3 << 20}
    line = cells({"setting": {"length": 512}, **found._asdict()})
    assert line[:3] == ["key, 512 tokens", "[64, 64, 4, 3]", "2e+03, 3"]
    assert line[3].startswith("built-in 3e+03, 3; wrong: result 0 differs by 5")


def test_nothing_is_chosen_where_nothing_runs() -> None:
    assert fastest("key", [], clock({})).fastest is None


def test_a_table_is_read_on_its_card_and_versions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table("NVIDIA H100 80GB HBM3", tmp_path, 8192, {"a": "triton"})
    assert path == tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert write_table("NVIDIA H100 80GB HBM3", tmp_path, 8192, {"b": [64, 64, 4, 3]}) == path
    assert write_table("NVIDIA H100 80GB HBM3", tmp_path, 131072, {"a": "flash_attn_4"}) == path
    lengths = {"8192": "triton", "131072": "flash_attn_4"}
    assert tuned.fastest("NVIDIA H100 80GB HBM3", tmp_path) == {"a": lengths, "b": {"8192": [64, 64, 4, 3]}}
    assert tuned.fastest("NVIDIA A100", tmp_path) == {}
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    for tokens, nearest in ((0, 8192), (100, 8192), (32000, 8192), (33000, 131072), (1 << 20, 131072)):
        assert tuned.tuned("a", tokens) == lengths[str(nearest)]
        assert tuned.tuned("b", tokens) == [64, 64, 4, 3]
    assert tuned.tuned("c", 8192) is None
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "1.0"}))
    tuned.fastest.cache_clear()
    with caplog.at_level(logging.INFO):
        assert tuned.tuned("a", 8192) is None
    assert "tune again" in caplog.text


def test_measured_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_available", {"triton", "flash_attn"}.__contains__)
    monkeypatch.setattr(choice, "_capability", lambda index: 9)
    bf16, packed = torch.bfloat16, Call(GPU, torch.bfloat16, 64, 8192, True)
    moba = MobaCall(GPU, bf16, 64, 512, 8192)
    assert full_attention_kernel(packed) == "flash_attn_2"
    assert moba_kernel(moba) == "triton"
    measured = {full_key(bf16, 64, True): "torch_flash", moba_key("moba", bf16, 64, 512): "flash_attn_2"}
    monkeypatch.setattr(choice, "tuned", lambda key, tokens: measured.get(key) if tokens == 8192 else None)
    assert full_attention_kernel(packed) == "torch_flash"
    assert full_attention_kernel(packed._replace(head_dim=128)) == "flash_attn_2"
    assert moba_kernel(moba) == "flash_attn_2"
    assert moba_kernel(moba._replace(ordinary=False)) == "triton"
    assert moba_kernel(moba._replace(block_size=128)) == "triton"
    assert moba_kernel(moba._replace(tokens=32768)) == "triton"
    assert full_attention_kernel(packed._replace(tokens=32768)) == "flash_attn_2"
    assert moba_kernel(moba, "triton") == "triton"
    monkeypatch.setattr(choice, "is_available", {"triton"}.__contains__)  # the library is no longer there
    assert moba_kernel(moba) == "triton"


def test_measured_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from neomoba_dist.model.attention.kernels.triton import common

    bf16 = torch.bfloat16
    usual = common.choose_tiles(64, bf16, 512, 8192), common.choose_key_tiles(64, bf16, 512, 8192)
    measured = {moba_key("tiles", bf16, 64, 512): [16, 32, 4, 2], moba_key("key_tiles", bf16, 64, 512): BY_ATOMICS}
    monkeypatch.setattr(common, "tuned", lambda key, tokens: measured.get(key) if tokens == 8192 else None)
    chosen = common.choose_tiles(64, bf16, 512, 8192), common.choose_key_tiles(64, bf16, 512, 8192)
    assert chosen == (common.Tiles(16, 32, 4, 2), common.Tiles(32, 16, 4, 1, atomics=True))
    assert chosen != usual
    assert common.choose_tiles(64, bf16, 256, 8192) == usual[0]
    assert common.choose_tiles(64, bf16, 512, 32768) == usual[0]


def test_the_choice_breaks_no_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_capability", torch.compiler.assume_constant_result(lambda index: 9))

    def scale(x: torch.Tensor) -> torch.Tensor:
        name = full_attention_kernel(Call(GPU, torch.bfloat16, 64, 8192, True))
        return x * len(name)

    run = torch.compile(scale, backend="eager", fullgraph=True)
    assert run(torch.ones(1)) == len("torch_flash")


def test_the_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times for real, at a size that means nothing; what the code reads is left alone."""
    words = ["bench", "tune", "--device", "cpu", "--repetitions", "1", "--table", str(tmp_path / "table")]
    assert program.main([*words, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert [row["key"] for row in rows] == ["full packed fp32 D16", "full single fp32 D16", "moba fp32 D16 B32"]
    assert [row["fastest"] for row in rows] == ["documents", "sdpa", "torch"]
    assert all(row["seconds"][row["fastest"]] > 0 for row in rows)
    assert all(row["peak_bytes"].keys() == row["seconds"].keys() for row in rows)
    assert not (tmp_path / "table").exists()
    assert "moba fp32 D16 B32, 256 tokens" in capsys.readouterr().out
