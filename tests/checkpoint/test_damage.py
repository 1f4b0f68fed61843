"""A torn, truncated, missing or changed file is never loaded: one line names it, the run takes an older checkpoint."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.checkpoint.layout import KINDS, AgreedReadError, CheckpointError, kind_and_name
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.checkpoint.resume import Candidates
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engines import build_engine
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
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
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
    candidates = Candidates(output, resume, build_mesh(run_config(LAYOUT)), lines.append)
    return candidates.newest(KINDS).folder.name, lines


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
        Candidates(output, str(output / "checkpoints" / "step_3"), Mesh.single(), print).newest(KINDS)
    tear(output / "checkpoints" / "step_1" / "weights-00003.safetensors")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        Candidates(output, "auto", Mesh.single(), print).newest(KINDS)


def load_into(config: Config, output: Path, resume: str) -> tuple[str, list[str], list[torch.Tensor], str]:
    """What a rank takes, says and then holds: its state, and the weights that it computes with; or the error."""
    mesh, lines = build_mesh(config), []  # type: ignore[var-annotated]
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    candidates = Candidates(output, resume, mesh, lines.append)
    try:
        reader = candidates.load(lambda reader: engine.load(reader, moments=True))
    except CheckpointError as error:
        return "", lines, [], str(error)
    held = [value.clone() for fragment in engine.local_state() for value in fragment.values.values()]
    held += [parameter.detach().clone() for parameter in engine.module.parameters()]
    return reader.folder.name, lines, held, ""


LOADED_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (lambda f: flip(f / "moments-00002.safetensors", -9), "moments-00002.safetensors: its checksum"),
    "flipped name": (lambda f: flip(f / "moments-00001.safetensors", 24), "moments-00001.safetensors: "),
    "torn file": (lambda f: tear(f / "weights-00000.safetensors"), "weights-00000.safetensors: "),
    "missing piece": (
        lambda f: change_index(f, lambda i: i["tensors"]["head.weight"]["parts"].pop()),
        "head.weight is incomplete",
    ),
    "no table": (lambda f: change_index(f, lambda i: i.update(tensors={"a": 1})), "not a table of tensors"),
}


@pytest.mark.parametrize("name", LOADED_DAMAGES)
@pytest.mark.parametrize(("layout", "stage"), [(LAYOUT, 1), ({}, 3)], ids=["as it was saved", "another layout"])
def test_damage_found_while_loading(run: Path, tmp_path: Path, name: str, layout: dict[str, Any], stage: int) -> None:
    """The checkpoint before is loaded, and nothing is left of the other one; alike in the layout that wrote it, where
    the bytes go from the files to their place while they are checked, and in another one."""
    output, config = tmp_path / "run", run_config(layout, stage)
    shutil.copytree(run, output)
    expected = run_ranks(WORLD, load_into, config, output, str(output / "checkpoints" / "step_2"))
    damage, message = LOADED_DAMAGES[name]
    damage(output / "checkpoints" / "step_3")
    for found, wanted in zip(run_ranks(WORLD, load_into, config, output, "auto"), expected, strict=True):
        assert (found[0], wanted[1], found[3]) == ("step_2", [], "")
        (line,) = found[1]
        assert "step_3 is not used" in line
        assert message in line
        assert all(torch.equal(a, b) for a, b in zip(found[2], wanted[2], strict=True))
    if name == "flipped bit":
        results = run_ranks(WORLD, load_into, config, output, str(output / "checkpoints" / "step_3"))
        (error,) = {error for *_, error in results}
        assert "moments-00002.safetensors: its checksum is wrong; the checkpoint is damaged" in error


def fail(*unused: object) -> None:
    """What a disk of many machines says now and then, and not the next time."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def load_beside_a_failing_disk(config: Config, output: Path) -> tuple[str, list[str], list[torch.Tensor], str]:
    """`load_into`, where the disk fails for one rank while it loads."""
    if int(os.environ["RANK"]) == 1:
        os.preadv = fail
    return load_into(config, output, "auto")


def test_a_failing_disk_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No older checkpoint is taken, which would put the newest one aside: the run ends, on all ranks alike."""
    results = run_ranks(WORLD, load_beside_a_failing_disk, run_config(LAYOUT), run)
    assert [(name, lines) for name, lines, *_ in results] == [("", [])] * WORLD
    (error,) = {error for *_, error in results}
    assert error.endswith(".safetensors: cannot be read (Stale file handle)")
    lines: list[str] = []
    candidates = Candidates(run, "auto", Mesh.single(), lines.append)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(AgreedReadError, match=r"cannot be read \(Stale file handle\)"):
        candidates.newest()
    assert lines == []


def test_every_byte_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank takes all of a file, its bytes are checked on the way to their place."""
    folder, read = run / "checkpoints" / "step_3", list[int]()
    original = os.preadv

    def count(file: int, buffers: list[memoryview], position: int) -> int:
        found = original(file, buffers, position)
        read.append(found)
        return found

    reader = CheckpointReader(folder)
    wanted = []  # everything, in the parts that it was cut into
    for key, entry in reader.tensors.items():
        for part in entry.parts:
            spec = ShardedTensorSpec(kind_and_name(key)[1], entry.shape, part.offset, part.shape)
            wanted.append(StateFragment(spec, 0, {entry.kind: torch.empty(math.prod(part.shape))}))
    monkeypatch.setattr(os, "preadv", count)
    reader.fill(wanted, reader.checksums(KINDS, (0, 1)))
    assert sum(read) == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for spec, _, values in wanted:
        for kind, value in values.items():
            assert torch.equal(value.view(spec.extent), reader.read(kind, spec))
