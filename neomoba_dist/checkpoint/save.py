"""Write a checkpoint: every rank a file of what it alone holds, then rank 0 the index and one rename.

Nothing is gathered. Ranks meet twice, with one flag each: when the folder stands, and when all files do. What rank 0
must know of the others' files it reads from the small JSON file that each leaves beside its own.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from neomoba_dist.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    VERSION,
    CheckpointError,
    complete_checkpoints,
    file_name,
    logical_name,
    read_json,
    step_folder,
)
from neomoba_dist.checkpoint.rank_file import write_rank_file
from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.parallel.comm import agree, on_first_rank
from neomoba_dist.parallel.mesh import Mesh


class StateFragment(NamedTuple):
    """Flat tensors of one parameter, by kind: elements from `start` on of the flattened part that `spec` describes."""

    spec: ShardedTensorSpec
    start: int
    values: Mapping[str, torch.Tensor]


class StateSource(Protocol):
    """What can be saved: a training engine."""

    config: Config
    mesh: Mesh

    def local_state(self) -> Iterator[StateFragment]: ...


def save_checkpoint(output: Path, step: int, source: StateSource, trainer: dict[str, Any], keep_last: int = 0) -> Path:
    """Write `output`/checkpoints/step_`step`; all ranks call it. Returns the folder.

    source: yields what this rank saves; all ranks' fragments fill every tensor once. trainer: what the training loop
    needs to go on, JSON. keep_last: older checkpoints beyond this number are removed (0: none). Raises CheckpointError
    on all ranks if one of them cannot write; the checkpoints before are then as they were.
    """
    mesh, final = source.mesh, step_folder(output, step)
    writing = final.with_name(final.name + ".writing")
    on_first_rank(mesh, lambda: make_empty(writing))
    problem = write_fragments(writing, mesh, list(source.local_state()))
    if not agree(problem is None, mesh):
        raise CheckpointError(problem or f"{writing}: another rank cannot write its file; see its message")
    document = {"format": FORMAT, "version": VERSION, "step": step, "config": source.config.to_dict()}
    on_first_rank(mesh, lambda: commit(writing, final, mesh["world"].size, document, {"step": step, **trainer}))
    if keep_last:
        on_first_rank(mesh, lambda: remove_old(output, keep_last))
    return final


def note_name(rank: int) -> str:
    """What a rank tells of its files; gone once rank 0 has put all together."""
    return f"rank-{rank:05d}.json"


def write_fragments(folder: Path, mesh: Mesh, fragments: Sequence[StateFragment]) -> str | None:
    """Write this rank's files, and beside them what the index needs. Returns what went wrong, in one line."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    pieces = []
    for spec, start, values in fragments:
        for kind, value in values.items():
            files.setdefault(file_name(kind, mesh.rank), {})[logical_name(kind, spec.name)] = value
        first = next(iter(values.values()))
        pieces.append(
            {
                "name": spec.name,
                "shape": spec.shape,
                "dtype": str(first.dtype).removeprefix("torch."),
                "kinds": list(values),
                "offset": spec.start,
                "extent": spec.extent,
                "range": [start, start + first.numel()],
            }
        )
    path, written = folder, {}
    try:
        needed = sum(value.numel() * value.element_size() for file in files.values() for value in file.values())
        if (free := shutil.disk_usage(folder).free) < needed:
            return f"{folder}: {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free; free some space"
        for name, tensors in files.items():
            path = folder / name
            written[name] = asdict(write_rank_file(path, tensors))
        path = folder / note_name(mesh.rank)
        write_text(path, json.dumps({"files": written, "pieces": pieces}))
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); free space or fix the folder"
    return None


def commit(writing: Path, final: Path, ranks: int, document: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Put the ranks' notes together as index and manifest, and give the folder its final name; on one rank."""
    notes = [read_json(writing / note_name(rank)) for rank in range(ranks)]
    texts = {
        "index.json": _dump_index({**document, "tensors": _tensors(notes)}),
        "trainer.json": json.dumps(trainer, indent=1) + "\n",
    }
    manifest = {name: entry for note in notes for name, entry in note["files"].items()}
    for name, text in texts.items():
        write_text(writing / name, text)
        manifest[name] = {"bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}
    write_text(writing / MANIFEST, json.dumps(manifest, indent=0) + "\n")
    for rank in range(ranks):
        (writing / note_name(rank)).unlink()
    sync(writing)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _tensors(notes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One entry per tensor: its parts, each with the flat ranges (between `cuts`) that the ranks hold of it."""
    tensors: dict[str, dict[str, Any]] = {}
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for rank, note in enumerate(notes):
        for piece in note["pieces"]:
            entry = {"shape": piece["shape"], "dtype": piece["dtype"], "kinds": piece["kinds"], "parts": []}
            tensors.setdefault(piece["name"], entry)
            part = json.dumps([piece["offset"], piece["extent"]])
            found.setdefault((piece["name"], part), []).append((*piece["range"], rank))
    for (name, part), ranges in sorted(found.items()):
        offset, shape = json.loads(part)
        ranges.sort()
        borders = [0, *(stop for _, stop, _ in ranges)]
        if [start for start, *_ in ranges] != borders[:-1] or borders[-1] != math.prod(shape):
            raise CheckpointError(f"{name}: the ranks' parts leave a gap or overlap; nothing was saved")
        ranks = [rank for *_, rank in ranges]
        tensors[name]["parts"].append({"offset": offset, "shape": shape, "cuts": borders, "ranks": ranks})
    return dict(sorted(tensors.items()))


def _dump_index(index: dict[str, Any]) -> str:
    """JSON with a line per tensor: readable, and small where every tensor lies in a thousand pieces."""
    tensors = index.pop("tensors")
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in tensors.items()
    )
    head = json.dumps(index, indent=1)
    return f'{head[:-2]},\n "tensors": {{\n{lines}\n }}\n}}\n'


def remove_old(output: Path, keep_last: int) -> None:
    """Keep the newest checkpoints only. A folder goes out of sight before its files go, so none is ever half there."""
    for old in complete_checkpoints(output)[:-keep_last]:
        gone = old.with_name(old.name + ".removed")
        old.rename(gone)
        shutil.rmtree(gone)


def set_aside_newer(output: Path, step: int) -> None:
    """Rename checkpoints beyond `step` to `step_N.abandoned`: a run that resumes from `step` will write its own.

    Called by one rank. Otherwise a later `--resume auto` would pick the branch that was given up.
    """
    for folder in complete_checkpoints(output):
        if int(folder.name.removeprefix("step_")) > step:
            aside = folder.with_name(folder.name + ".abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def make_empty(folder: Path) -> None:
    """An empty folder of this name. Raises CheckpointError."""
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while writing
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from error


def write_text(path: Path, text: str) -> None:
    """A text file, flushed to disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
