"""A checkpoint in one process, tensor by tensor: merged, described, compared. No process group, no whole state."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save_file

from neomoba_dist.checkpoint.files import make_empty, sync, write_text
from neomoba_dist.checkpoint.index import Entry
from neomoba_dist.checkpoint.layout import CheckpointError, kind_and_name, step_folder
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.save import document_head
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.checkpoint.verify import refuse_damage
from neomoba_dist.checkpoint.write import commit, write_fragments
from neomoba_dist.model.init import ShardedTensorSpec

T = TypeVar("T")
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
    config, files = reader.config, list(reader.folder.rglob("*.safetensors"))
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
    require_new(output)
    refuse_damage(reader.folder, ("model",))
    parts = [
        WholeTensor(name.removeprefix("model."), num_bytes(entry), partial(read_whole, reader, name))
        for name, entry in reader.tensors.items()
        if name.startswith("model.")
    ]
    with new_folder(output) as writing:
        where = write_tensors(parts, writing, file_bytes)
        index = {"metadata": {"step": reader.index["step"]}, "weight_map": where}
        write_text(writing / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        write_text(writing / "config.json", json.dumps(reader.index["config"], indent=1) + "\n")
    return [output / name for name in sorted(set(where.values()))]


def write_run(
    reader: CheckpointReader,
    output: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the weights as a new run folder that holds one export (weights alone); returns the export.

    change: by logical name ("blocks.0.attention.q_proj") and whole tensor what is written of it. In memory are at most
    `file_bytes`, or the largest tensor. Raises CheckpointError.
    """
    require_new(output)
    step, config = int(reader.index["step"]), reader.config
    final = step_folder(output, step, export=True)
    writing = final.with_name(final.name + ".writing")
    make_empty(writing)
    weights = ((num_bytes(entry), name) for name, entry in reader.tensors.items() if name.startswith("model."))

    def fragment(name: str) -> StateFragment:
        spec = ShardedTensorSpec(kind_and_name(name)[1], reader.tensors[name].shape)
        changed = change(spec.name, read_whole(reader, name))
        return StateFragment(spec, 0, {"model": changed.flatten().contiguous()})

    ranks = 0
    for names in groups_of_bytes(weights, file_bytes):  # each file as if a rank had written it
        write_fragments(writing, ranks, [fragment(name) for name in names], ("model",))
        ranks += 1
    commit(writing, final, ranks, document_head(config, step), {"step": step, "world_size": 1})
    write_text(output / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
    return final


class WholeTensor(NamedTuple):
    """A tensor to be written: its name there, its bytes, and how it is read when its turn comes."""

    name: str
    bytes: int
    read: Callable[[], torch.Tensor]


def num_bytes(entry: Entry) -> int:
    """Of a whole logical tensor."""
    return math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize


def groups_of_bytes(sized: Iterable[tuple[int, T]], most: int) -> Iterator[list[T]]:
    """Neighbours together, of at most so many bytes; what is larger stands alone."""
    held: list[T] = []
    size = 0
    for new, item in sized:
        if held and size + new > most:
            yield held
            held, size = [], 0
        held.append(item)
        size += new
    if held:
        yield held


def write_tensors(
    parts: Iterable[WholeTensor], folder: Path, file_bytes: int, metadata: dict[str, str] | None = None
) -> dict[str, str]:
    """Files of at most `file_bytes`, one after the other in memory; which tensor lies in which."""
    where: dict[str, str] = {}
    for number, group in enumerate(groups_of_bytes(((part.bytes, part) for part in parts), file_bytes), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file({part.name: part.read() for part in group}, folder / file, metadata=metadata)
        (folder / file).chmod(0o644)  # safetensors writes 0600
        sync(folder / file)
        where |= dict.fromkeys((part.name for part in group), file)
    return where


def require_new(output: Path) -> None:
    """Raises CheckpointError where the folder is there already."""
    if output.exists():
        raise CheckpointError(f"{output}: is there already; give a new folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once all is on disk. Raises CheckpointError where it cannot."""
    writing = output.with_name(output.name + ".writing")
    make_empty(writing)
    try:
        yield writing
        sync(writing)
        writing.rename(output)
        sync(output.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"{writing}: cannot be written ({error.strerror}); free space or fix the folder"
        ) from error
