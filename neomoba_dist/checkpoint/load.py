"""Read a checkpoint into any layout: each rank reads the slices that it needs, whoever wrote them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neomoba_dist.checkpoint.layout import (
    Box,
    CheckpointError,
    Entry,
    Piece,
    boxes_of_part,
    find_checkpoint,
    logical_name,
    read_index,
    read_json,
    tensor_entries,
)
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.config import Config, parse_config
from neomoba_dist.model.init import ShardedTensorSpec, shard_of
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh


class CheckpointReader:
    """A checkpoint opened for reading. path: a step_N folder, or a run folder (its newest checkpoint)."""

    def __init__(self, path: Path | str) -> None:
        self.folder = find_checkpoint(Path(path))
        self.index = read_index(self.folder)
        self.tensors = tensor_entries(self.index, self.folder)  # by logical name
        self._files: dict[str, Any] = {}

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

    def read_range(self, kind: str, shard: ShardedTensorSpec, start: int, stop: int) -> torch.Tensor:
        """The elements start..stop of the flattened part that `shard` describes: [stop - start], as `read`."""
        parts = [
            self.read(kind, replace(shard, start=box.offset, extent=box.shape)).flatten()
            for box in boxes_of_part(shard.start, shard.extent, start, stop)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

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
        for piece in entry.pieces:
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
                part[target] = self._rectangle(piece, box, source)
                filled += math.prod(e - b for b, e in zip(begin, end, strict=True))
        if filled != part.numel():
            name = logical_name(kind, shard.name)
            raise CheckpointError(f"{self.folder}: {name} is incomplete; the checkpoint is damaged, use another one")

    def _rectangle(self, piece: Piece, box: Box, where: tuple[slice, ...]) -> torch.Tensor:
        """The part `where` of a box, of which only the rows that hold it are read."""
        if not where:
            return self._slice(piece, slice(0, 1)).view(())
        row = math.prod(box.shape[1:])
        rows = where[0]
        flat = self._slice(piece, slice(box.base + rows.start * row, box.base + rows.stop * row))
        return flat.view(rows.stop - rows.start, *box.shape[1:])[(slice(None), *where[1:])]

    def _slice(self, piece: Piece, where: slice) -> torch.Tensor:
        """Elements of a stored key, flat."""
        path = self.folder / piece.file
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(path, framework="pt")
            if self.index["version"] == 1:  # stored in the shape of the part
                return self._files[piece.file].get_tensor(piece.key).flatten()[where]
            return self._files[piece.file].get_slice(piece.key)[where]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); the checkpoint is damaged, use another one"
            ) from error


def load_weights(reader: CheckpointReader, module: torch.nn.Module) -> None:
    """Fill the parameters of `module` (any layout) in place with the checkpoint's weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            shard = shard_of(parameter)
            shard.valid(parameter).copy_(reader.read("model", shard))
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
    if problem := find_damage(reader.folder, ("model",)):
        raise CheckpointError(f"{problem}; the checkpoint is damaged, use another one")
    config = reader.config
    model = NeoBERT(config.model, mesh or Mesh.single(device), dtype=dtype)
    load_weights(reader, model)
    return model.to(device).eval(), config
