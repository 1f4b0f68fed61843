"""launch/convert.py: merged weights are those of the run bit for bit; differences and damage are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.convert import main
from neomoba_dist.checkpoint.convert import merge
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.errors import FAILED, MISTAKE
from tests.checkpoint.test_layouts import whole_tensors
from tests.ranks import run_ranks
from tests.runs import run_config, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps by tp 2 x dp 2, both saved."""
    output = tmp_path_factory.mktemp("run")
    run_ranks(4, train_here, run_config({"tensor_model_parallel_size": 2}, 2), output, 1)
    return output


@pytest.mark.parametrize("file_bytes", [1, 5000, 1 << 30])
def test_merge(run: Path, tmp_path: Path, file_bytes: int) -> None:
    files = merge(CheckpointReader(run), tmp_path / "merged", file_bytes)
    found = {name: (file.name, value) for file in files for name, value in load_file(file).items()}
    expected = {n.removeprefix("model."): v for n, v in whole_tensors(run).items() if n.startswith("model.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][1], value) for name, value in expected.items())
    where = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert where == {name: file for name, (file, _) in found.items()}
    assert len(files) == {1: len(expected), 1 << 30: 1}.get(file_bytes, len(files))
    assert not (tmp_path / "merged.writing").exists()


def test_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--info"]) == 0
    said = capsys.readouterr().out
    assert "step 1," in said
    assert "4 ranks" in said
    assert "tensor_model_parallel_size 2" in said
    assert main([str(run), "--verify"]) == 0
    assert main([str(run), "--diff", str(run)]) == 0
    assert main([str(run), "--merge", str(tmp_path)]) == MISTAKE
    assert "is there already" in capsys.readouterr().err


def test_differences_and_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "step_1"
    other.mkdir()
    for file in CheckpointReader(run).folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    file = other / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # a bit of the last weight's exponent
    file.write_bytes(data)
    assert main([str(run), "--diff", str(other)]) == FAILED
    assert sum(not line.endswith(" 0.000e+00") for line in capsys.readouterr().out.splitlines()) == 1
    assert main([str(other), "--verify"]) == FAILED
    assert "checksum is wrong" in capsys.readouterr().err
    assert main([str(other), "--merge", str(tmp_path / "merged")]) == MISTAKE
    assert not (tmp_path / "merged").exists()
