"""What a checkpoint looks like on disk.

    step_100/
      index.json          format, version, step, the resolved config, and for each logical tensor its whole shape,
                          dtype and pieces: (file, key, offset, shape)
      trainer.json        step, tokens seen, position in the data, world size
      model.pp0-tp0.safetensors, exp_avg.pp0-tp0.safetensors, exp_avg_sq.pp0-tp0.safetensors, ...

Logical names are those of the single process ("model.blocks.0.attention.q_proj"), whatever the layout that wrote them.
A folder under its final name is complete: it is written as `step_100.writing`, flushed to disk, then renamed.
"""

import json
import re
from pathlib import Path
from typing import Any

from neomoba_dist.config.paths import is_file_name

FORMAT = "neomoba-checkpoint"
VERSION = 1
KINDS = ("model", "exp_avg", "exp_avg_sq")  # fp32 weights; AdamW's first and second moments
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line that names the file."""


def logical_name(kind: str, name: str) -> str:
    """Name in the index: "model.<name>" for weights, "optimizer.exp_avg.<name>" for moments."""
    return f"model.{name}" if kind == "model" else f"optimizer.{kind}.{name}"


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
    """index.json; its format, version and the names of its files are checked. Raises CheckpointError."""
    index = read_json(folder / "index.json")
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise CheckpointError(f"{folder / 'index.json'}: not a checkpoint of format {FORMAT} version {VERSION}")
    for name, entry in index.get("tensors", {}).items():
        for piece in entry["pieces"]:
            if not is_file_name(piece["file"]):
                raise CheckpointError(
                    f"{folder / 'index.json'}: {name} lies in {piece['file']!r}, which is no plain file name; do not "
                    "use this checkpoint"
                )
    return index
