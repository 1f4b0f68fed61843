"""A checkpoint in one process, tensor by tensor: merged, described, compared. No process group, no whole state."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from neomoba_dist.checkpoint.layout import CheckpointError, kind_and_name
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.save import make_empty, sync, write_text
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.model.init import ShardedTensorSpec

FILE_BYTES = 1 << 30  # of a merged file; a larger tensor has a file of its own


class Difference(NamedTuple):
    """One logical tensor of two checkpoints: the largest absolute difference, or why there is none to tell."""

    name: str
    largest: float
    problem: str | None = None


def read_whole(reader: CheckpointReader, name: str) -> torch.Tensor:
    """A logical tensor ("model.NAME", "optimizer.exp_avg.NAME") in its whole shape. Raises CheckpointError."""
    kind, local = kind_and_name(name)
    return reader.read(kind, ShardedTensorSpec(local, reader.tensors[name].shape))


def describe(reader: CheckpointReader) -> str:
    """Step, layout, tensors and sizes, for people."""
    config, files = reader.config, list(reader.folder.glob("*.safetensors"))
    weights = [entry for name, entry in reader.tensors.items() if name.startswith("model.")]
    layout = ", ".join(f"{name} {value}" for name, value in reader.index["config"]["neomoba"]["parallel"].items())
    return "\n".join(
        [
            f"{reader.folder}: step {reader.index['step']}, format version {reader.index['version']}",
            f"written by {reader.trainer()['world_size']} ranks: {layout}, ZeRO {config.zero_stage}",
            f"{len(reader.tensors)} tensors, {sum(math.prod(entry.shape) for entry in weights):,} weights and biases",
            f"{len(files)} files with tensors, {sum(file.stat().st_size for file in files):,} bytes",
        ]
    )


def differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[Difference]:
    """Every logical tensor of either, in order of names; two of it are in memory at a time."""
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        lacking = [reader.folder for reader in (first, second) if name not in reader.tensors]
        if lacking:
            yield Difference(name, math.inf, f"not in {lacking[0]}")
        elif first.tensors[name].shape != second.tensors[name].shape:
            shapes = [list(reader.tensors[name].shape) for reader in (first, second)]
            yield Difference(name, math.inf, f"shape {shapes[0]} and {shapes[1]}")
        else:
            a, b = read_whole(first, name), read_whole(second, name)
            apart = torch.where(a == b, 0.0, (a.double() - b.double()).abs())  # equal infinities are not apart
            apart = torch.where(apart.isnan(), math.inf, apart)
            apart[a.isnan() & b.isnan()] = 0.0
            yield Difference(name, float(apart.max()) if apart.numel() else 0.0)


def merge(reader: CheckpointReader, output: Path, file_bytes: int = FILE_BYTES) -> list[Path]:
    """Write the weights in their whole shapes under the names of one process; returns the files.

    The new folder `output` holds model-00001.safetensors and so on, model.safetensors.index.json (which tensor lies
    where) and config.json, the configuration of the run. In memory are at most `file_bytes` or the largest tensor.
    Raises CheckpointError where the checkpoint is damaged or the folder is there already or cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: is there already; give a new folder")
    if problem := find_damage(reader.folder, ("model",)):
        raise CheckpointError(f"{problem}; the checkpoint is damaged, use another one")
    writing = output.with_name(output.name + ".writing")
    make_empty(writing)
    try:
        where = _write_files(reader, writing, file_bytes)
        index = {"metadata": {"step": reader.index["step"]}, "weight_map": where}
        write_text(writing / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        write_text(writing / "config.json", json.dumps(reader.index["config"], indent=1) + "\n")
        sync(writing)
        writing.rename(output)
        sync(output.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"{writing}: cannot be written ({error.strerror}); free space or fix the folder"
        ) from error
    return [output / name for name in sorted(set(where.values()))]


def _write_files(reader: CheckpointReader, folder: Path, file_bytes: int) -> dict[str, str]:
    """Files of at most `file_bytes`, one after the other; which tensor lies in which."""
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(held, folder / file)
        (folder / file).chmod(0o644)  # safetensors writes 0600
        sync(folder / file)
        where.update(dict.fromkeys(held, file))
        held.clear()

    size = 0
    for name in (name for name in reader.tensors if name.startswith("model.")):
        entry = reader.tensors[name]
        new = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if held and size + new > file_bytes:
            flush()
            size = 0
        held[name.removeprefix("model.")] = read_whole(reader, name)
        size += new
    flush()
    return where
