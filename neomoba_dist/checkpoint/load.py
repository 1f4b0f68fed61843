"""Read a checkpoint into any layout: each rank reads the slices that it needs, whoever wrote them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neomoba_dist.checkpoint.layout import CheckpointError, find_checkpoint, logical_name, read_index, read_json
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
        name = logical_name(kind, shard.name)
        entry = self.index["tensors"].get(name)
        if entry is None:
            hint = " (a dense model becomes a mixture of experts with --upcycle)" if ".mlp.router." in name else ""
            raise CheckpointError(
                f"{self.folder}: holds no tensor {name}; was it written by another architecture?{hint}"
            )
        if tuple(entry["shape"]) != shard.shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {entry['shape']}, this model wants {list(shard.shape)}; "
                "use the model block of the config that wrote it"
            )
        part = torch.empty(shard.extent, dtype=getattr(torch, entry["dtype"]))
        filled = 0
        for piece in entry["pieces"]:
            begin = [max(a, b) for a, b in zip(shard.start, piece["offset"], strict=True)]
            end = [
                min(a + n, b + m)
                for a, n, b, m in zip(shard.start, shard.extent, piece["offset"], piece["shape"], strict=True)
            ]
            if any(e <= b for b, e in zip(begin, end, strict=True)):
                continue
            source = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, piece["offset"], strict=True))
            target = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, shard.start, strict=True))
            part[target] = self._slice(piece["file"], piece["key"], source)
            filled += part[target].numel()
        if filled != part.numel():
            raise CheckpointError(f"{self.folder}: {name} is incomplete; the checkpoint is damaged, use another one")
        return part

    def _slice(self, file: str, key: str, where: tuple[slice, ...]) -> torch.Tensor:
        path = self.folder / file
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt")
            return self._files[file].get_slice(key)[where]
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
    config = reader.config
    model = NeoBERT(config.model, mesh or Mesh.single(device), dtype=dtype)
    load_weights(reader, model)
    return model.to(device).eval(), config
