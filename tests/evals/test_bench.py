"""The benchmarks run, at sizes that mean nothing, and a stage that fails costs no other."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import evals.__main__ as program
from evals.bench import _attention_timing as timing
from evals.bench import gpu, recall
from evals.bench._attention_timing import Setting, _flex, _is_earlier, causal_block_mask, sdpa, tensors
from evals.bench._profile import kernel_times, profile_lines
from neomoba_dist.errors import MISTAKE
from neomoba_dist.model.attention.moba import moba_attention
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def test_attention_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "attention", "--cases", "96:2,160:1", "--forward-only", "200:1", "--block-size", "16"]
    words += ["--top-k", "2", "--head-dim", "8", "--repetitions", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert program.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:3] == ["tokens", "heads", "rival"]
    assert "200 tokens x 1 heads, MoBA forward" in shown
    assert "160 tokens x 1, f+b ms: moba " in shown
    result = json.loads((tmp_path / "attention.json").read_text())
    for row, tokens in zip(result["rows"], (96, 160), strict=True):
        assert row["both_ratio"] == row["full"]["both"] / row["moba"]["both"]
        assert (row["rivals"], row["moba_peers"]) == ({"sdpa": row["full"]}, {})
        blocks = tokens // 16
        sparse = tokens * 17 / 2 + 256 * (blocks - 1)
        expected = (tokens * (tokens + 1) / 2) / (sparse + tokens * tokens / 64)
        assert row["pair_limit"] == pytest.approx(max(1.0, expected))
        assert row["moba_tflops"] * 1e12 * row["moba"]["both"] == pytest.approx(14 * 8 * row["heads"] * sparse)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_causal_block_mask_is_that_of_torch() -> None:
    for length in (128, 384, 1024):
        ours, theirs = (
            causal_block_mask(length, "cpu"),
            create_block_mask(_is_earlier, None, None, length, length, "cpu"),
        )
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
        assert ours.shape == theirs.shape


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """flash_attn_func of flash-attn 2.8.3, [B, T, H, D]; the real one takes more by name."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def parallel_moba(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, chunk_size: int,
    topk: int,
) -> torch.Tensor:  # fmt: skip
    """fla/ops/moba/parallel.py, [1, T, H, D]."""
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, max_seqlen]
    return moba_attention(q[0], k[0], v[0], block_size=chunk_size, top_k=topk, causal=True)[None]


def test_libraries_are_timed_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(96, 4, 2, 16, 16, 2, True, "float32", "cpu", 1)
    alike = setting._replace(kv_heads=4)
    makers = {name: partial(timing._library, setting, module) for name, module in timing.LIBRARIES.items()}
    assert timing._those_that_run(makers, setting) == {}
    assert timing._those_that_run({"fla_moba": partial(timing._fla_moba, alike)}, alike) == {}
    left_out = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in left_out] == [f"{name} left out" for name in (*makers, "fla_moba")]

    modules = {
        "flash_attn": SimpleNamespace(flash_attn_func=full_attention),
        "flash_attn.cute": SimpleNamespace(flash_attn_func=lambda *qkv, causal: (full_attention(*qkv, causal), None)),
        "fla.ops.moba.parallel": SimpleNamespace(parallel_moba=parallel_moba),
    }
    monkeypatch.setattr(timing, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    q, k, v, _ = tensors(setting)
    found = timing._those_that_run(makers, setting)
    assert list(found) == ["flash_attn_4", "flash_attn_2"]
    for attention in found.values():
        assert torch.equal(attention(q, k, v), sdpa(setting)(q, k, v))
    q, k, v, _ = tensors(alike)
    peer = timing._those_that_run({"fla_moba": partial(timing._fla_moba, alike)}, alike)["fla_moba"]
    assert torch.equal(peer(q, k, v), timing.moba(alike)(q, k, v))
    assert (peer(q, k, v) - sdpa(alike)(q, k, v)).abs().max() > 0.01


@pytest.mark.full
def test_every_length_of_flex_attention_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # dynamo and its limits alone
    for length in (128, 256):  # two graphs each; at the limit of eight it would take five lengths
        setting = Setting(length, 2, 2, 16, 64, 2, True, "float32", "cpu", 1)
        q, k, v, _ = (x.detach() for x in tensors(setting))
        attention, expected = _flex(setting), sdpa(setting)(q, k, v)
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            for with_gradient in (True, False):
                with torch.set_grad_enabled(with_gradient):
                    assert (attention(q, k, v) - expected).abs().max() < 1e-5


def test_recall_rows_hold_every_pair_twice() -> None:
    batch, distance = recall.make_rows(64, 3, torch.Generator().manual_seed(0))
    where = (batch.labels >= 0).nonzero()[:, 0]
    assert len(where) == batch.num_valid == 3 * 8
    for place in where.tolist():
        first = place - int(distance[place])
        assert first // 64 == place // 64  # the same row
        assert first < place
        assert batch.input_ids[first] == batch.input_ids[place] < recall.KEYS
        assert batch.input_ids[first + 1] == batch.input_ids[place + 1] == batch.labels[place]
        row = batch.input_ids[place // 64 * 64 :][:64]
        assert (row == batch.input_ids[place]).sum() == 2


def stage(name: str, code: str, limit: int = 60, results: tuple[str, ...] = ()) -> gpu.Stage:
    return gpu.Stage(name, ["-c", code], limit, list(results))


def test_a_stage_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"length": 64, "attention": "moba", "tokens_per_second": 5.0, "mfu": 0.25, "peak_gib": 1.0}]
    write = f"import json; json.dump(dict(rows={rows}), open({str(tmp_path / 'phase1.json')!r}, 'w'))"
    found = [
        stage("attention", "import time; print('began', flush=True); time.sleep(60)", 2, ("attention.json",)),
        stage("tests", "raise SystemExit('3 failed')"),
        stage("phase1", write, results=("phase1.json",)),
    ]
    monkeypatch.setattr(gpu, "stages", lambda *options: found)
    monkeypatch.setattr(gpu, "machine", lambda: dict.fromkeys(("device", "torch", "triton", "python"), "?"))
    (tmp_path / "attention.json").write_text("{}")  # of an earlier run
    assert program.main(["bench", "gpu", "--output", str(tmp_path)]) == 1
    done = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [entry["status"] for entry in done.values()] == ["stopped after 2 s", "ok", "exit code 1"]
    assert done["attention"]["results"] == {}
    shown = capsys.readouterr().out
    assert "3 failed" in shown
    assert "began" in shown
    assert "25.00 % (5 tokens/s, 1 GiB)" in shown
    assert "| tests: exit code 1" in (tmp_path / "summary.md").read_text()


def test_short_calls_make_one_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = "import json; json.dump(dict(ratio=1.1, moe_seconds=1.1, dense_seconds=1.0), open({!r}, 'w'))"
    found = [
        stage("tests", "print('7 passed')"),
        stage("moe", moe.format(str(tmp_path / "moe.json")), results=("moe.json",)),
    ]
    monkeypatch.setattr(gpu, "stages", lambda *options: found)
    head = dict.fromkeys(("device", "torch", "triton", "python"), "?")
    monkeypatch.setattr(gpu, "machine", lambda: head)
    words = ["bench", "gpu", "--output", str(tmp_path), "--only"]
    assert program.main([*words, "moe"]) == 0
    capsys.readouterr()
    assert program.main([*words, "tests"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("1.100 x (1100 / 1000 ms)") < shown.index("7 passed")
    assert list(json.loads((tmp_path / "summary.json").read_text())["stages"]) == ["moe", "tests"]

    assert program.main([*words, "test"]) == MISTAKE
    assert "--only test: no such stage; choose of moe, " in capsys.readouterr().err
    monkeypatch.setattr(gpu, "machine", lambda: {**head, "device": "another"})
    assert program.main([*words, "tests"]) == MISTAKE
    assert "another machine" in capsys.readouterr().err


def test_stages_fit_calls_of_five_minutes() -> None:
    limits = {entry.name: entry.limit for entry in gpu.stages(Path("x"), toy=False)}
    assert tuple(limits) == gpu.NAMES
    assert sum(limits[name] for name in gpu.USUAL) < 19 * 60
    calls = [line for line in (ROOT / "docs/benchmarks.md").read_text().splitlines() if "bench gpu --only" in line]
    named = [call.split("--only ")[1].split()[0].split(",") for call in calls]
    assert sorted(name for names in named for name in names) == sorted(gpu.NAMES)
    assert all(sum(limits[name] for name in names) <= 5 * 60 - 15 for names in named)  # less the look at the machine
    asked = {name for name in limits if name not in ("phase1_graphs", "million", "tests", "recall", "tune")}
    assert set(named[0] + named[1]) == asked  # all that must be reached, in two calls


def test_what_a_stage_leaves_of_its_time_the_next_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, slow = stage("moe", "", 60), stage("peer", "import time; time.sleep(2)", 1)
    monkeypatch.setattr(gpu, "stages", lambda *options: [quick, slow])
    monkeypatch.setattr(gpu, "machine", lambda: dict.fromkeys(("device", "torch", "triton", "python"), "?"))
    words = ["bench", "gpu", "--output", str(tmp_path), "--only"]
    assert program.main([*words, "peer"]) == 1
    assert "peer: stopped after 1 s" in capsys.readouterr().out
    assert program.main([*words, "moe,peer"]) == 0
    assert int(capsys.readouterr().err.splitlines()[-1].removeprefix("peer: at most ").removesuffix(" s")) > 50


@pytest.mark.full
def test_the_whole_gpu_benchmark_at_toy_size(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "evals", "bench", "gpu", "--toy", "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    left_out = {"phase1_graphs": "left out: CUDA graphs need a GPU"}
    assert {name: entry["status"] for name, entry in stages.items()} == dict.fromkeys(stages, "ok") | left_out
    assert list(stages) == list(gpu.USUAL)
    assert all(entry["results"] for name, entry in stages.items() if name not in ("tests", *left_out))
    assert done.stdout.count("not measured") == 16  # toy sizes count for nothing
    assert "phase1_graphs: left out: CUDA graphs need a GPU" in done.stdout


# what a machine with torch, numpy, triton and pytest alone lacks
ABSENT = (
    "deepspeed megatron webdataset hjson pydantic matplotlib tqdm safetensors tokenizers sentencepiece pyarrow "
    "datasets tensorboard pytest_timeout fsspec einops yaml psutil"
)
HIDE = f"""
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT.split()!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.full
def test_kernels_are_tested_and_timed_where_the_engine_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    words = [sys.executable, "-m", "evals", "bench", "gpu", "--toy", "--output", str(tmp_path)]
    stages = ["moe", "moe_large", "phase3_shape", "flash_moba", "attention", "million", "tests", "recall"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*words, "--only", ",".join(stages)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no plot: No module named 'matplotlib'" in (tmp_path / "attention.log").read_text()
    assert list(json.loads((tmp_path / "summary.json").read_text())["stages"]) == stages


def test_the_time_of_an_update_by_operator(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = torch.randn(2, 300, 300)
    found = kernel_times(lambda: [a @ b for _ in range(5)], "cpu")
    product = next(kernel for kernel in found["kernels"] if kernel["name"] == "aten::mm")
    assert product["launches"] == 5
    assert found["busy_seconds"] == pytest.approx(sum(kernel["seconds"] for kernel in found["kernels"]))
    many = {**found, "kernels": [{"name": "x" * 99, "seconds": 1.0, "launches": 2}] * 30, "busy_seconds": 30.0}
    head, first, *_, last = profile_lines(many)
    assert head[0].startswith("busy 30000.0 of ")
    assert first == ["x" * 70 + "...", "1000.00", "3.3 %", "2"]
    assert last == ["5 others", "5000.00", "16.7 %", "10"]


def test_an_update_of_a_phase_is_profiled(tmp_path: Path) -> None:
    words = ("-m", "evals", "bench", "train_step", "--ds-config", ROOT / "ds_configs/cpu_tiny.json", "--profile")
    done = run_program(*words, "--micro-batches", 1, "--steps", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cpu_tiny, moba: one update" in done.stdout
    for row in json.loads((tmp_path / "cpu_tiny.json").read_text())["rows"]:
        launches = {kernel["name"]: kernel["launches"] for kernel in row["profile"]["kernels"]}
        assert launches["neomoba::attend" if row["attention"] == "moba" else "aten::mm"] > 0
