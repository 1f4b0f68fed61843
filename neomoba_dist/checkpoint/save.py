"""Write a checkpoint: every rank its own shards, rank 0 the index, then one rename."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from neomoba_dist.checkpoint.layout import (
    FORMAT,
    KINDS,
    VERSION,
    CheckpointError,
    complete_checkpoints,
    logical_name,
    step_folder,
)
from neomoba_dist.config import Config
from neomoba_dist.model.init import ShardedTensorSpec, shard_of
from neomoba_dist.parallel.comm import all_gather_objects, on_first_rank
from neomoba_dist.parallel.mesh import Mesh


class StateSource(Protocol):
    """What can be saved: a training engine."""

    config: Config
    mesh: Mesh

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def saved_buffers(self) -> Iterator[tuple[ShardedTensorSpec, torch.Tensor]]: ...
    def full_state(self, parameter: nn.Parameter, kind: str) -> torch.Tensor: ...


def save_checkpoint(output: Path, step: int, source: StateSource, trainer: dict[str, Any], keep_last: int = 0) -> Path:
    """Write `output`/checkpoints/step_`step`; all ranks call it. Returns the folder.

    source: gives its parameters and, collectively over dp x cp, the full fp32 state of each. trainer: what the training
    loop needs to go on, JSON. keep_last: older checkpoints beyond this number are removed (0: none).
    """
    mesh, final = source.mesh, step_folder(output, step)
    writing = final.with_name(final.name + ".writing")
    on_first_rank(mesh, lambda: _make_empty(writing))
    pieces: dict[str, dict[str, Any]] = {}
    owned = _owned_names(source)
    try:
        for kind in KINDS:
            pieces.update(_write_kind(writing, kind, source, owned))
    except OSError as error:
        raise CheckpointError(
            f"{writing}: cannot be written ({error.strerror}); free space or fix the folder"
        ) from error
    all_pieces = all_gather_objects(pieces, mesh, "world")
    index = {"format": FORMAT, "version": VERSION, "step": step, "config": source.config.to_dict()}

    def finish() -> None:
        _write_json(writing / "trainer.json", {"step": step, **trainer})
        _write_json(writing / "index.json", {**index, "tensors": _merge(all_pieces)})
        _sync(writing)
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            final.rename(replaced)
        writing.rename(final)
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in complete_checkpoints(output)[:-keep_last] if keep_last else []:
            shutil.rmtree(old)

    on_first_rank(mesh, finish)
    return final


def set_aside_newer(output: Path, step: int) -> None:
    """Rename checkpoints beyond `step` to `step_N.abandoned`: a run that resumes from `step` will write its own.

    Called by one rank. Otherwise a later `--resume auto` would pick the branch that was given up.
    """
    for folder in complete_checkpoints(output):
        if int(folder.name.removeprefix("step_")) > step:
            aside = folder.with_name(folder.name + ".abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def _owned_names(source: StateSource) -> set[str]:
    """Logical names whose shards this rank writes: one writer per shard."""
    mesh = source.mesh
    mine = [shard_of(p) for p in source.parameters()] + [shard for shard, _ in source.saved_buffers()]
    by_stage: Sequence[list[str]] = all_gather_objects([shard.name for shard in mine], mesh, "pp")
    earlier = {name for stage in by_stage[: mesh["pp"].index] for name in stage}  # a tied matrix lives on two stages
    return {
        shard.name
        for shard in mine
        if shard.name not in earlier
        and mesh["expert_dp" if "ep" in shard.axes else "dp_cp"].index == 0
        and ("tp" in shard.axes or mesh["tp"].index == 0)
    }


def _write_kind(folder: Path, kind: str, source: StateSource, owned: set[str]) -> dict[str, dict[str, Any]]:
    """Write this rank's file of one kind; returns its pieces by logical name."""
    mesh = source.mesh
    expert = f"-ep{mesh['ep'].index}" if mesh["ep"].size > 1 else ""
    file = f"{kind}.pp{mesh['pp'].index}-tp{mesh['tp'].index}{expert}.safetensors"
    tensors, pieces = {}, {}
    states = ((shard_of(p), source.full_state(p, kind)) for p in source.parameters())
    for shard, whole in chain(states, source.saved_buffers() if kind == "model" else ()):
        if shard.name not in owned or 0 in shard.extent:
            continue
        tensors[shard.name] = shard.valid(whole).detach().to("cpu", copy=True).contiguous()
        piece = {"file": file, "key": shard.name, "offset": list(shard.start), "shape": list(shard.extent)}
        dtype = str(tensors[shard.name].dtype).removeprefix("torch.")
        pieces[logical_name(kind, shard.name)] = {"shape": list(shard.shape), "dtype": dtype, "pieces": [piece]}
    if tensors:
        save_file(tensors, folder / file)
        (folder / file).chmod(0o644)  # safetensors writes 0600: colleagues could not read the checkpoint
        _sync(folder / file)
    return pieces


def _merge(all_pieces: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One entry per logical tensor with the pieces of all ranks."""
    merged: dict[str, dict[str, Any]] = {}
    for pieces in all_pieces:
        for name, entry in pieces.items():
            if name in merged:
                merged[name]["pieces"] += entry["pieces"]
            else:
                merged[name] = entry
    return dict(sorted(merged.items()))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while writing
    folder.mkdir(parents=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
