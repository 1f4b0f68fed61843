"""What a checkpoint looks like on disk (docs/checkpoint.md).

    step_100/
      index.json                  format, version, step, the resolved config, and where every logical tensor lies
      trainer.json                step, tokens seen, position in the data, world size
      manifest.json               size and checksum of every other file
      weights-00000.safetensors   float32 weights that rank 0 held, flat parts of the tensors
      moments-00000.safetensors   AdamW's moments of the same parts
      ...                         one pair for every rank that holds something
      ranks-00256/                those of ranks 256 to 511, and so on: no folder has thousands of files

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
from neomoba_dist.errors import FAILED, UserError

FORMAT = "neomoba-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("model", "exp_avg", "exp_avg_sq")  # fp32 weights; AdamW's first and second moments
STEMS = {"model": "weights", "exp_avg": "moments", "exp_avg_sq": "moments"}  # of the files that hold them
RANKS_PER_FOLDER = 256
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message is one line that names the file."""


class AgreedCheckpointError(CheckpointError):
    """The same on all ranks, after they have agreed: one of them may speak for all."""

    on_all_ranks = True


class ReadError(CheckpointError):
    """A file that is there could not be read, as a disk of many machines has it now and then: perhaps it can the next
    time."""

    exit_code = FAILED


class AgreedReadError(ReadError):
    """The same on all ranks, after they have agreed."""

    on_all_ranks = True


class DamageError(CheckpointError):
    """Something of a checkpoint is missing or wrong. problem: what, in one line that names the file."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; the checkpoint is damaged, use another one")
        self.problem = problem


class AgreedDamageError(DamageError):
    """The same on all ranks, after they have agreed."""

    on_all_ranks = True


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, offset and shape, whose elements lie in row-major order from `base` on."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    base: int = 0


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


def file_name(kind: str, rank: int, per_folder: int | None) -> str:
    """The file in which a rank writes a kind; from rank `per_folder` on in a folder of so many ranks (None: never)."""
    name = f"{STEMS[kind]}-{rank:05d}.safetensors"
    first = rank // per_folder * per_folder if per_folder else 0
    return f"ranks-{first:05d}/{name}" if first else name


def is_stored_name(name: Any) -> bool:
    """Whether `name`, read from a file, names a file of the checkpoint: nothing outside its folder."""
    parts = name.split("/") if isinstance(name, str) else []
    return len(parts) in (1, 2) and all(map(is_file_name, parts))


def logical_name(kind: str, name: str) -> str:
    """Name of a tensor: "model.<name>" for weights, "optimizer.exp_avg.<name>" for moments."""
    return f"model.{name}" if kind == "model" else f"optimizer.{kind}.{name}"


def kind_and_name(logical: str) -> tuple[str, str]:
    """The reverse of `logical_name`."""
    kind, _, name = logical.removeprefix("optimizer.").partition(".")
    return kind, name


def step_folder(output: Path, step: int, *, export: bool = False) -> Path:
    """Where the run's checkpoint of `step` lies; export: where its weights alone do, from which no run resumes."""
    return output / ("exports" if export else "checkpoints") / f"step_{step}"


def step_of(folder: Path) -> int:
    """The step of a `step_folder`."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(output: Path, *, exports: bool = False) -> list[Path]:
    """The run's complete checkpoints, or exports, oldest first."""
    folder = step_folder(output, 0, export=exports).parent
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if (path / "index.json").is_file()), key=step_of)


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`, or where a run keeps its best
    weights alone (launch/finetune.py), these. Raises CheckpointError."""
    if (path / "index.json").is_file():
        return path
    newest = complete_checkpoints(path) or complete_checkpoints(path, exports=True)
    if not newest:
        raise CheckpointError(f"{path}: no checkpoint here; give a run folder or one of its checkpoints/step_N folders")
    return newest[-1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamageError(f"{path}: expected a JSON object")
    return value
