"""The format: ranges as rectangles, files that the safetensors package reads, nothing gathered, the old version."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from neomoba_dist.checkpoint import save, write
from neomoba_dist.checkpoint.convert import describe
from neomoba_dist.checkpoint.index import Entry, Part
from neomoba_dist.checkpoint.layout import KINDS, Box, boxes_of_range
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.checkpoint.rank_file import Slice, checksum_of, write_rank_file
from neomoba_dist.checkpoint.save import CheckpointSaver
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.train.engines import build_engine
from tests.checkpoint.test_layouts import assert_loads, whole_tensors
from tests.ranks import run_ranks
from tests.runs import build_mesh, run_config, train_here

VERSION_1 = Path(__file__).parent / "version1"  # written by the code of 27 November 2026 with tp 2 x pp 2
SMALL = {
    "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8,
    "num_hidden_layers": 2, "hybrid_layer_count": 1, "tie_word_embeddings": True,
}  # fmt: skip


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_range_is_its_rectangles(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole, found = torch.arange(total).view(shape), []
    boxes = list(boxes_of_range(start, stop, tuple(shape)))
    for box in boxes:
        part = whole[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))]
        assert part.flatten()[0] == box.base
        found += part.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


def test_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7), "b": torch.randn(3, dtype=torch.float64), "c": torch.arange(5)}
    written = write_rank_file(tmp_path / "x", tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "x").items())
    assert checksum_of(tmp_path / "x") == written
    assert written.bytes == (tmp_path / "x").stat().st_size


@pytest.mark.parametrize(("world", "layout", "stage"), [(1, {}, 1), (4, {"tensor_model_parallel_size": 2}, 2)])
def test_version_1_loads(world: int, layout: dict[str, Any], stage: int) -> None:
    index, stored = json.loads((VERSION_1 / "index.json").read_text()), {}
    for name, entry in index["tensors"].items():  # read here independently of our reader
        stored[name] = torch.full(entry["shape"], torch.nan)
        for piece in entry["pieces"]:
            where = tuple(slice(a, a + n) for a, n in zip(piece["offset"], piece["shape"], strict=True))
            stored[name][where] = load_file(VERSION_1 / piece["file"])[piece["key"]]
    found = whole_tensors(VERSION_1)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    assert_loads(run_config(layout, stage, model=SMALL), world, VERSION_1)
    assert load_model(VERSION_1)[1].model.hidden_size == 8


def save_and_count(config: Config, output: Path) -> tuple[dict[str, int], int]:
    """Calls of torch.distributed in one save, and the bytes of this rank's share."""
    engine = build_engine(config, config.plan(dist.get_world_size()), build_mesh(config))
    calls: dict[str, int] = {}
    largest = 0

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal largest
            calls[name] = calls.get(name, 0) + 1
            largest = max([largest, *(x.numel() for x in args if isinstance(x, torch.Tensor))])
            return function(*args, **options)

        return call

    for name in dir(dist):
        if callable(function := getattr(dist, name)) and name.startswith(
            ("all_", "broadcast", "gather", "reduce", "send")
        ):
            setattr(dist, name, counted(name, function))
    saver = CheckpointSaver(output, engine, config.checkpoint)
    saver.save(1, {})
    saver.finish()
    return calls, largest


@pytest.mark.parametrize(
    ("world", "layout", "stage"),
    [(4, {}, 1), (4, {}, 3), (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1)],
)
def test_nothing_is_gathered(tmp_path: Path, world: int, layout: dict[str, Any], stage: int) -> None:
    """The ranks agree by flags of one number; every file holds its rank's share, and all bytes are 12 per parameter."""
    for calls, largest in run_ranks(world, save_and_count, run_config(layout, stage), tmp_path):
        assert calls.keys() <= {"all_reduce"}
        assert largest <= 1
    folder = tmp_path / "checkpoints" / "step_1"
    reader = CheckpointReader(folder)
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    parameters = sum(math.prod(entry.shape) for name, entry in reader.tensors.items() if name.startswith("model."))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))
    assert sum(sizes.values()) - headers == 12 * parameters
    if not layout:  # equal shares over dp, whatever the sizes of the tensors
        shares = [sizes[f"moments-{rank:05d}.safetensors"] for rank in range(world)]
        assert max(shares) <= 1.3 * min(shares)  # the last one ends in padding


def test_a_slice_finds_its_pieces() -> None:
    part = Part((0, 0), (1000, 8), range(0, 8001, 8), range(1000))
    entry = Entry("model", "model.x", (2000, 8), "float32", (part, replace(part, offset=(1000, 0))))
    assert [piece.start for piece in entry.pieces(Box((500, 2), (3, 4)))] == [4000, 4008, 4016]
    assert len(list(entry.pieces(Box((999, 0), (2, 8))))) == 2


def test_a_slice_reads_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a tensor in many pieces: only the rows that hold it are read."""
    run_ranks(4, train_here, run_config({}, 3), tmp_path, 1)
    reader, read = CheckpointReader(tmp_path), []
    original = CheckpointReader._read

    def count(self: CheckpointReader, file: str, part: Slice) -> None:
        read.append(len(part.out))
        original(self, file, part)

    name = "blocks.0.mlp.gate_proj"
    rows, columns = reader.tensors[f"model.{name}"].shape
    whole = reader.read("model", ShardedTensorSpec(name, (rows, columns)))
    monkeypatch.setattr(CheckpointReader, "_read", count)
    part = reader.read("model", ShardedTensorSpec(name, (rows, columns), (3, 5), (7, 11)))
    assert torch.equal(part, whole[3:10, 5:16])
    assert sum(read) <= 7 * columns
    flat = torch.empty(86)
    reader.read_range("model", ShardedTensorSpec(name, (rows, columns), (4, 0), (8, columns)), 13, flat)
    assert torch.equal(flat, whole[4:12].flatten()[13:99])
    read.clear()
    reader.read_range("model", ShardedTensorSpec(name, (rows, columns)), 13, flat)
    assert torch.equal(flat, whole.flatten()[13:99])
    assert sum(read) == 86  # straight into `flat`
    assert set(KINDS) == {"model", "exp_avg", "exp_avg_sq"}


def test_files_are_spread_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many ranks on; the same tensors as in one folder, checked, described, loaded and damaged like them."""
    config = run_config({"tensor_model_parallel_size": 2}, 2)
    run_ranks(4, train_here, config, tmp_path / "flat", 1)
    for module in (write, save):
        monkeypatch.setattr(module, "RANKS_PER_FOLDER", 2)
    run_ranks(4, train_here, config, tmp_path / "spread", 1)
    monkeypatch.undo()
    folder = tmp_path / "spread" / "checkpoints" / "step_1"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tensors = {f"{stem}-0000{rank}.safetensors" for stem in ("weights", "moments") for rank in (0, 1)}
    spread = {f"ranks-00002/{stem}-0000{rank}.safetensors" for stem in ("weights", "moments") for rank in (2, 3)}
    assert names == {*tensors, *spread, "index.json", "manifest.json", "trainer.json"}
    found, expected = whole_tensors(folder), whole_tensors(tmp_path / "flat")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert find_damage(folder) is None
    assert "8 files with tensors" in describe(CheckpointReader(folder))
    (folder / "ranks-00002" / "moments-00003.safetensors").unlink()
    assert "ranks-00002/moments-00003.safetensors: missing" in str(find_damage(folder))


def test_ranks_look_at_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together at every file, each once, and each rank at those that it has written."""
    run_ranks(4, train_here, run_config({}, 1), tmp_path, 1)
    folder, looked = tmp_path / "checkpoints" / "step_1", []
    original = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked.append(path.name) or original(path))
    for rank in range(4):
        looked.clear()
        assert find_damage(folder, share=(rank, 4)) is None
        assert {name for name in looked if "safetensors" in name} == {
            f"{stem}-0000{rank}.safetensors" for stem in ("weights", "moments")
        }
