"""A torn, truncated, missing or changed file is never loaded: one line names it, the run takes an older checkpoint."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.checkpoint.resume import choose_checkpoint
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.runs import build_mesh, run_config, train_here

WORLD = 4
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of three steps."""
    output = tmp_path_factory.mktemp("run")
    config = run_config(LAYOUT, checkpoint={"save_every": 1})
    run_ranks(WORLD, train_here, config, output, 3)
    return output


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index, and the manifest with it: what a broken writer would leave."""
    index, manifest = (json.loads((folder / name).read_text()) for name in ("index.json", "manifest.json"))
    change(index)
    text = json.dumps(index)
    (folder / "index.json").write_text(text)
    manifest["index.json"] = {"bytes": len(text), "sha256": sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path, place: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    """The second half never reached the disk."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / "index.json").unlink(), "no checkpoint here"),
    "cut index": (lambda f: (f / "index.json").write_text('{"form'), "index.json: not valid JSON"),
    "changed index": (lambda f: flip(f / "index.json", -40), "index.json"),
    "other format": (lambda f: change_index(f, lambda i: i.update(version=9)), "not a checkpoint of format"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "manifest of paths": (
        lambda f: (f / "manifest.json").write_text('{"../x": {"bytes": 1, "sha256": ""}}'),
        "no plain file name",
    ),
    "missing file": (lambda f: (f / "weights-00001.safetensors").unlink(), "weights-00001.safetensors: missing"),
    "cut file": (
        lambda f: (f / "weights-00002.safetensors").write_bytes((f / "weights-00002.safetensors").read_bytes()[:900]),
        "weights-00002.safetensors: 900 bytes",
    ),
    "torn file": (lambda f: tear(f / "weights-00000.safetensors"), "weights-00000.safetensors: its checksum is wrong"),
    "flipped bit": (lambda f: flip(f / "weights-00003.safetensors", -5), "weights-00003.safetensors: its checksum"),
    "flipped header": (lambda f: flip(f / "weights-00003.safetensors", 20), "weights-00003.safetensors: its checksum"),
    "missing piece": (
        lambda f: change_index(f, lambda i: i["tensors"]["head.weight"]["parts"].pop()),
        "model.head.weight is incomplete",
    ),
    "missing tensor": (
        lambda f: change_index(f, lambda i: i["tensors"].pop("final_norm.weight")),
        "holds no tensor model.final_norm.weight",
    ),
    "no table": (lambda f: change_index(f, lambda i: i.update(tensors={"a": 1})), "not a table of tensors"),
    "other shape": (
        lambda f: change_index(f, lambda i: i["config"]["neomoba"]["model"].update(intermediate_size=64)),
        "has shape [48, 32], this model wants [64, 32]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(run: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "step_1"
    shutil.copytree(run / "checkpoints" / "step_1", folder)
    assert find_damage(folder) is None
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_read_without_the_moments(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    shutil.copytree(run / "checkpoints" / "step_1", folder)
    flip(folder / "moments-00001.safetensors", -1)
    load_model(folder)
    assert "moments-00001.safetensors" in str(find_damage(folder))


def choose(output: Path, resume: str) -> tuple[str, list[str]]:
    lines: list[str] = []
    reader = choose_checkpoint(output, resume, build_mesh(run_config(LAYOUT)), lines.append)
    return reader.folder.name, lines


def test_the_newest_whole_checkpoint_is_taken(run: Path, tmp_path: Path) -> None:
    """By all ranks alike, whichever of them reads the damaged file; the line says what was refused, and why."""
    output = tmp_path / "run"
    shutil.copytree(run, output)
    assert run_ranks(WORLD, choose, output, "auto") == [("step_3", [])] * WORLD
    flip(output / "checkpoints" / "step_3" / "moments-00002.safetensors", -9)
    (output / "checkpoints" / "step_2" / "weights-00001.safetensors").unlink()
    for name, lines in run_ranks(WORLD, choose, output, "must"):
        assert name == "step_1"
        assert ["step_3 is not used" in lines[0], "step_2 is not used" in lines[1]] == [True, True]
        assert "moments-00002.safetensors: its checksum is wrong" in lines[0]
    with pytest.raises(CheckpointError, match="moments-00002"):
        choose_checkpoint(output, str(output / "checkpoints" / "step_3"), Mesh.single(), print)
    tear(output / "checkpoints" / "step_1" / "weights-00003.safetensors")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        choose_checkpoint(output, "auto", Mesh.single(), print)
