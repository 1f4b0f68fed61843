"""The format: ranges as rectangles, files that the safetensors package reads, nothing gathered, the old version."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from neomoba_dist.checkpoint.layout import KINDS, boxes_of_range
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.checkpoint.rank_file import checksum_of, write_rank_file
from neomoba_dist.checkpoint.save import save_checkpoint
from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.train.engine import build_engine
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
    save_checkpoint(output, 1, engine, {})
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


def test_a_slice_reads_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a tensor in many pieces: only the rows that hold it are read."""
    run_ranks(4, train_here, run_config({}, 3), tmp_path, 1)
    reader, read = CheckpointReader(tmp_path), []
    original = CheckpointReader._slice

    def count(self: CheckpointReader, piece: Any, where: slice) -> torch.Tensor:
        read.append(where.stop - where.start)
        return original(self, piece, where)

    name = "blocks.0.mlp.gate_proj"
    rows, columns = reader.tensors[f"model.{name}"].shape
    whole = reader.read("model", ShardedTensorSpec(name, (rows, columns)))
    monkeypatch.setattr(CheckpointReader, "_slice", count)
    part = reader.read("model", ShardedTensorSpec(name, (rows, columns), (3, 5), (7, 11)))
    assert torch.equal(part, whole[3:10, 5:16])
    assert sum(read) <= 7 * columns
    flat = reader.read_range("exp_avg", ShardedTensorSpec(name, (rows, columns), (4, 0), (8, columns)), 13, 99)
    assert len(flat) == 86
    assert set(KINDS) == {"model", "exp_avg", "exp_avg_sq"}
