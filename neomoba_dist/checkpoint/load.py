"""Read a checkpoint into any layout: each rank reads the slices that it needs, whoever wrote them."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neomoba_dist.checkpoint.index import Entry, Piece, read_index, tensor_entries
from neomoba_dist.checkpoint.layout import (
    MANIFEST,
    Box,
    CheckpointError,
    DamageError,
    ReadError,
    boxes_of_part,
    find_checkpoint,
    logical_name,
    read_json,
)
from neomoba_dist.checkpoint.rank_file import STREAMS, RankFile, Slice
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.checkpoint.verify import checksums_of_share, refuse_damage
from neomoba_dist.config import Config, parse_config
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.init import ShardedTensorSpec, views_of
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh

OPEN_FILES = 128


class CheckpointReader:
    """A checkpoint opened for reading. path: a step_N folder, or a run folder (its newest checkpoint).

    has_checksums: whether the files can be held against any.
    """

    has_checksums = True

    def __init__(self, path: Path | str) -> None:
        self.folder = find_checkpoint(Path(path))
        self.index = read_index(self.folder)
        self.tensors = tensor_entries(self.index, self.folder)  # by logical name
        self._open = functools.lru_cache(OPEN_FILES)(lambda name: RankFile(self.folder / name))

    @property
    def config(self) -> Config:
        """The resolved configuration of the run that wrote it."""
        return parse_config(self.index["config"], source=str(self.folder / "index.json"))

    def trainer(self) -> dict[str, Any]:
        """trainer.json: what the training loop needs to go on."""
        return read_json(self.folder / "trainer.json")

    def read(self, kind: str, shard: ShardedTensorSpec) -> torch.Tensor:
        """The part of a logical tensor that `shard` describes, shape `shard.extent`, on the CPU.

        Raises CheckpointError if the tensor is missing, has another shape or is not completely there.
        """
        entry = self._entry(kind, shard)
        part = torch.empty(shard.extent, dtype=getattr(torch, entry.dtype))
        self._fill(part, kind, shard, entry, Box(shard.start, shard.extent))
        return part

    def read_range(self, kind: str, shard: ShardedTensorSpec, start: int, out: torch.Tensor) -> None:
        """Fill the flat tensor `out` with elements of the flattened part that `shard` describes, from `start` on.

        Where `stored` finds them, the bytes go straight from the file into `out`. Raises as `read`.
        """
        stored = self.stored(kind, shard, start, out)
        for file, part in stored or ():
            self._read(file, part)
        if stored is None:
            filled = 0
            for box in boxes_of_part(shard.start, shard.extent, start, start + out.numel()):
                values = self.read(kind, replace(shard, start=box.offset, extent=box.shape)).flatten()
                out[filled : filled + len(values)].copy_(values)
                filled += len(values)

    def stored(
        self, kind: str, shard: ShardedTensorSpec, start: int, out: torch.Tensor
    ) -> list[tuple[str, Slice]] | None:
        """In which files, and where, that lies which is to fill `out`; None where the tensor was cut into other parts.

        It is cut into the same ones with as many ranks of tp and ep as before. Arguments as `read_range`.
        """
        if not out.numel():  # all padding
            return []
        entry = self.tensors.get(logical_name(kind, shard.name))
        part = entry.part_at(shard.start, shard.extent) if entry and entry.shape == shard.shape else None
        if not entry or not part:
            return None
        found, stop = [], start + out.numel()
        for piece in entry.range_of(part, start, stop):
            first, last = max(start, piece.start), min(stop, piece.stop)
            found.append((piece.file, Slice(piece.key, first - piece.start, out[first - start : last - start])))
        return found

    def checksums(self, kinds: Sequence[str], share: tuple[int, int]) -> dict[str, str]:
        """By name the checksums of a share of the files, as `find_damage` has it; of version 1 and the hub none."""
        if not self.has_checksums or self.index["version"] == 1:
            return {}
        path = self.folder / MANIFEST
        try:
            return checksums_of_share(read_json(path), kinds, share)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{path}: not a table of files ({error!r})") from error

    def fill(self, fragments: Sequence[StateFragment], checksums: Mapping[str, str]) -> None:
        """Fill the tensors of the fragments, and hold the files that `checksums` names against these.

        Those are read whole and once, their bytes straight into the tensors where `stored` finds them; several files
        at a time, as a disk of many machines serves one stream slowly. Raises as `read`, and DamageError: the tensors
        then hold anything.
        """
        parts: dict[str, list[Slice]] = {name: [] for name in checksums}
        others: dict[str, list[tuple[ShardedTensorSpec, int, torch.Tensor]]] = {}
        for spec, start, values in fragments:
            for kind, out in values.items():
                stored = self.stored(kind, spec, start, out)
                for file, part in stored or ():
                    parts.setdefault(file, []).append(part)
                if stored is None:
                    others.setdefault(kind, []).append((spec, start, out))

        def read_others(kind: str) -> None:
            for other in others[kind]:
                self.read_range(kind, *other)

        with ThreadPoolExecutor(STREAMS) as pool:
            jobs = [pool.submit(self._read_file, name, found, checksums.get(name)) for name, found in parts.items()]
            jobs += [pool.submit(read_others, kind) for kind in others]
            try:
                for job in as_completed(jobs):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after the first failure

    def _entry(self, kind: str, shard: ShardedTensorSpec) -> Entry:
        name = logical_name(kind, shard.name)
        entry = self.tensors.get(name)
        if entry is None:
            hint = " (a dense model becomes a mixture of experts with --upcycle)" if ".mlp.router." in name else ""
            raise CheckpointError(
                f"{self.folder}: holds no tensor {name}; was it written by another architecture?{hint}"
            )
        if entry.shape != shard.shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(entry.shape)}, this model wants {list(shard.shape)}; "
                "use the model block of the config that wrote it"
            )
        return entry

    def _fill(self, part: torch.Tensor, kind: str, shard: ShardedTensorSpec, entry: Entry, wanted: Box) -> None:
        """Copy everything that the pieces hold of a rectangle of the logical tensor into `part`, in place."""
        filled = 0
        for piece in entry.pieces(wanted):
            for box in piece.boxes():
                begin = [max(a, b) for a, b in zip(wanted.offset, box.offset, strict=True)]
                end = [
                    min(a + n, b + m)
                    for a, n, b, m in zip(wanted.offset, wanted.shape, box.offset, box.shape, strict=True)
                ]
                if any(e <= b for b, e in zip(begin, end, strict=True)):
                    continue
                target = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, wanted.offset, strict=True))
                source = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, box.offset, strict=True))
                part[target] = self._rectangle(piece, box, source, part.dtype)
                filled += math.prod(e - b for b, e in zip(begin, end, strict=True))
        if filled != part.numel():
            name = logical_name(kind, shard.name)
            raise DamageError(f"{self.folder}: {name} is incomplete")

    def _rectangle(self, piece: Piece, box: Box, where: tuple[slice, ...], dtype: torch.dtype) -> torch.Tensor:
        """The part `where` of a box, of which only the rows that hold it are read."""
        first, rows = (where[0].start, where[0].stop - where[0].start) if where else (0, 1)
        row = math.prod(box.shape[1:])
        flat = torch.empty(rows * row, dtype=dtype)
        self._read(piece.file, Slice(piece.key, box.base + first * row, flat))
        return flat.view(rows, *box.shape[1:])[(slice(None), *where[1:])] if where else flat.view(())

    def _read(self, file: str, part: Slice) -> None:
        with self._naming(file):
            self._open(file).read(part)

    def _read_file(self, name: str, parts: Sequence[Slice], checksum: str | None) -> None:
        """Fill the parts from one file, which is read whole where its checksum is given."""
        with self._naming(name):
            file, found = RankFile(self.folder / name), None
            if checksum is not None:
                found = file.read_whole(parts)
            else:
                for part in parts:
                    file.read(part)
        if found != checksum:
            raise DamageError(f"{self.folder / name}: its checksum is wrong")

    @contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        """Turns what reading a file raises into one line that names it."""
        try:
            yield
        except OSError as error:  # perhaps not the next time: no reason to take an older checkpoint
            raise ReadError(f"{self.folder / file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DamageError(f"{self.folder / file}: cannot be read ({error})") from error


def load_weights(reader: CheckpointReader, module: torch.nn.Module) -> None:
    """Fill the parameters of `module` (any layout) in place with the checkpoint's weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            for shard, view in views_of(parameter):
                view.copy_(reader.read("model", shard))
    load_buffers(reader, module)


def load_buffers(reader: CheckpointReader, module: torch.nn.Module) -> None:
    """Fill what is saved beside the parameters."""
    for shard, buffer in saved_buffers(module):
        buffer.copy_(reader.read("model", shard))


def load_model(
    path: Path | str, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[NeoBERT, Config]:
    """The model of a checkpoint in eval mode, and the config of its run.

    path: a step_N folder or a run folder. mesh: the layout to load into, by default one process. MoBA layers run MoBA.
    Raises CheckpointError on a missing or damaged checkpoint.
    """
    reader = CheckpointReader(path)
    refuse_damage(reader.folder, ("model",))
    config = reader.config
    model = MODELS[config.model.objective](config.model, mesh or Mesh.single(device), dtype=dtype)
    load_weights(reader, model)
    return model.to(device).eval(), config
