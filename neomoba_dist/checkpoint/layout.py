"""What a checkpoint looks like on disk (docs/checkpoint.md).

    step_100/
      index.json                  format, version, step, the resolved config, and where every logical tensor lies
      trainer.json                step, tokens seen, position in the data, world size
      manifest.json               size and checksum of every other file
      weights-00000.safetensors   float32 weights that rank 0 held, flat parts of the tensors
      moments-00000.safetensors   AdamW's moments of the same parts
      ...                         one pair for every rank that holds something

Logical names are those of the single process ("model.blocks.0.attention.q_proj"), whatever the layout that wrote them.
A folder under its final name is complete: it is written as `step_100.writing`, flushed to disk, then renamed.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neomoba_dist.config.paths import is_file_name

FORMAT = "neomoba-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("model", "exp_avg", "exp_avg_sq")  # fp32 weights; AdamW's first and second moments
STEMS = {"model": "weights", "exp_avg": "moments", "exp_avg_sq": "moments"}  # of the files that hold them
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line that names the file."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, offset and shape, whose elements lie in row-major order from `base` on."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    base: int = 0


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of the flattened part `offset`, `shape` of a logical tensor: `key` of `file`, from 0 on."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    def boxes(self) -> Iterator[Box]:
        """The rectangles that the elements fill; their offsets in the logical tensor, their bases in the stored key."""
        return boxes_of_part(self.offset, self.shape, self.start, self.stop)


@dataclass(frozen=True)
class Entry:
    """A logical tensor: its whole shape, the name of its dtype, and the pieces that fill it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


def boxes_of_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The elements start..stop of a flattened tensor as few rectangles; `base` is where each begins in the tensor."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape), start)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if start % row or stop - start < row:  # the rest of a row that is not whole
        end = min(stop, (first + 1) * row)
        for box in boxes_of_range(start - first * row, end - first * row, shape[1:]):
            yield Box((first, *box.offset), (1, *box.shape), first * row + box.base)
        yield from boxes_of_range(end, stop, shape)
        return
    whole = stop // row
    yield Box((first, *(0 for _ in shape[1:])), (whole - first, *shape[1:]), start)
    if last >= whole:
        yield from boxes_of_range(whole * row, stop, shape)


def boxes_of_part(offset: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements start..stop of the flattened part `offset`, `shape` of a tensor, where they are stored flat.

    Offsets are those in the whole tensor; `base` counts from `start`.
    """
    for box in boxes_of_range(start, stop, shape):
        yield Box(tuple(a + b for a, b in zip(offset, box.offset, strict=True)), box.shape, box.base - start)


def file_name(kind: str, rank: int) -> str:
    """The file in which a rank writes a kind."""
    return f"{STEMS[kind]}-{rank:05d}.safetensors"


def logical_name(kind: str, name: str) -> str:
    """Name of a tensor: "model.<name>" for weights, "optimizer.exp_avg.<name>" for moments."""
    return f"model.{name}" if kind == "model" else f"optimizer.{kind}.{name}"


def kind_and_name(logical: str) -> tuple[str, str]:
    """The reverse of `logical_name`."""
    kind, _, name = logical.removeprefix("optimizer.").partition(".")
    return kind, name


def step_folder(output: Path, step: int) -> Path:
    """Where the run's checkpoint of `step` lies."""
    return output / "checkpoints" / f"step_{step}"


def complete_checkpoints(output: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folder = output / "checkpoints"
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if (path / "index.json").is_file()), key=lambda p: int(p.name[5:]))


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`. Raises CheckpointError."""
    if (path / "index.json").is_file():
        return path
    newest = complete_checkpoints(path)
    if not newest:
        raise CheckpointError(f"{path}: no checkpoint here; give a run folder or one of its checkpoints/step_N folders")
    return newest[-1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); the checkpoint is damaged, use another one"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object; the checkpoint is damaged, use another one")
    return value


def read_index(folder: Path) -> dict[str, Any]:
    """index.json; its format and version are checked. Raises CheckpointError."""
    index = read_json(folder / "index.json")
    if index.get("format") != FORMAT or index.get("version") not in (1, VERSION):
        raise CheckpointError(f"{folder / 'index.json'}: not a checkpoint of format {FORMAT} version {VERSION} or 1")
    return index


def tensor_entries(index: dict[str, Any], folder: Path) -> dict[str, Entry]:
    """The logical tensors of an index, by logical name. Raises CheckpointError where a file is not a plain name."""
    try:
        parse = _entries_of_version_1 if index["version"] == 1 else _entries
        entries = parse(index)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{folder / 'index.json'}: not a table of tensors ({error!r}); the checkpoint is damaged, use another one"
        ) from error
    for name, entry in entries.items():
        for piece in entry.pieces:
            if not is_file_name(piece.file):
                raise CheckpointError(
                    f"{folder / 'index.json'}: {name} lies in {piece.file!r}, which is no plain file name; do not "
                    "use this checkpoint"
                )
    return entries


def _entries(index: dict[str, Any]) -> dict[str, Entry]:
    """All kinds of a tensor share their geometry, so it stands once in the file."""
    entries = {}
    for name, found in index["tensors"].items():
        for kind in found["kinds"]:
            key, pieces = logical_name(kind, name), []
            for part in found["parts"]:
                offset, shape, cuts = tuple(part["offset"]), tuple(part["shape"]), part["cuts"]
                for rank, start, stop in zip(part["ranks"], cuts[:-1], cuts[1:], strict=True):
                    pieces.append(Piece(file_name(kind, rank), key, offset, shape, start, stop))
            entries[key] = Entry(tuple(found["shape"]), found["dtype"], tuple(pieces))
    return entries


def _entries_of_version_1(index: dict[str, Any]) -> dict[str, Entry]:
    """One tensor-parallel rank's whole part per piece, stored in its own shape."""
    entries = {}
    for name, found in index["tensors"].items():
        pieces = tuple(
            Piece(p["file"], p["key"], tuple(p["offset"]), tuple(p["shape"]), 0, math.prod(p["shape"]))
            for p in found["pieces"]
        )
        entries[name] = Entry(tuple(found["shape"]), found["dtype"], pieces)
    return entries
