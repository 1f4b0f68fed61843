"""What a checkpoint will be, on any number of ranks, without any of them: files, bytes, and seconds at given rates.

Every rank's part is laid out as ZeRO would, with tensors on the meta device, and goes through the functions that write
checkpoints; tests/checkpoint/test_plan.py holds the result against real ones, byte by byte.
"""

import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neomoba_dist.checkpoint.index import describe_fragments, index_text
from neomoba_dist.checkpoint.layout import KINDS
from neomoba_dist.checkpoint.rank_file import file_header
from neomoba_dist.checkpoint.save import document_head
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.checkpoint.write import manifest_text, note_path, note_text, rank_files
from neomoba_dist.config import Config, parse_config
from neomoba_dist.model.block import Block
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.init import Initializer, shard_of
from neomoba_dist.model.moe.layer import moe_layers, saved_buffers
from neomoba_dist.model.neobert import Layer, layer_list
from neomoba_dist.parallel.comm import num_bytes
from neomoba_dist.parallel.mesh import AXES, Axis, Mesh
from neomoba_dist.train.fragments import Fragment, by_part, is_copy
from neomoba_dist.train.optim import moments_of, parameter_groups

_NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SHAPES: Mapping[str, dict[str, Any]] = {
    "1B": dict(zip(_NAMES, (128_256, 2048, 16, 32, 8192), strict=True)) | {"tie_word_embeddings": True},  # Llama 3.2
    "7B": dict(zip(_NAMES, (32_000, 4096, 32, 32, 14_336), strict=True)),  # Mistral
    "70B": dict(zip(_NAMES, (128_256, 8192, 80, 64, 28_672), strict=True)),  # Llama 3
}


@dataclass(frozen=True)
class Rates:
    """GB (10^9 bytes) per second: of a machine and of the whole file system, to and from disk; of a GPU to the host."""

    machine: float = 5.0
    disk: float = 100.0
    bus: float = 20.0
    ranks_per_machine: int = 8


@dataclass(frozen=True)
class CheckpointPlan:
    """Sizes in bytes; per-rank lists in rank order: what a rank writes, and what it reads beside that to load it.

    index_seconds: of putting the index together, here and now.
    """

    parameters: int
    written: list[int]
    copies: list[int]
    files: Mapping[str, int]
    json: Mapping[str, int]
    index_seconds: float

    @property
    def most_files_in_a_folder(self) -> int:
        """With the notes that stand there while it is written."""
        folders = Counter(Path(name).parent for name in (*self.files, *self.json))
        return max(folders.values())

    def seconds(self, moved: list[int], rates: Rates) -> float:
        """Of moving so many bytes per rank to or from disk: the busiest machine or the file system, the slower one."""
        step = rates.ranks_per_machine
        machines = [sum(moved[first : first + step]) for first in range(0, len(moved), step)]
        return max(max(machines) / rates.machine, sum(moved) / rates.disk) / 1e9

    def save_seconds(self, rates: Rates) -> float:
        """From the copy to the rename."""
        return self.seconds(self.written, rates) + self.index_seconds

    def pause_seconds(self, rates: Rates) -> float:
        """Of training, for the copy to host memory."""
        return max(self.written) / rates.bus / 1e9

    def load_seconds(self, rates: Rates) -> float:
        """In the layout that wrote it: every rank its own files and, of others, its copies; nothing from a cache."""
        return self.seconds([sum(both) for both in zip(self.written, self.copies, strict=True)], rates)


def plan_checkpoint(config: Config, world_size: int) -> CheckpointPlan:
    """The checkpoint that `world_size` ranks would write, and what they would read of it in the same layout."""
    described, written, copies = [], [], []
    files: dict[str, int] = {}
    json: dict[str, int] = {}
    manifest: dict[str, Any] = {}
    modules = functools.cache(functools.partial(stage_module, config))
    for rank in range(world_size):
        mesh = Mesh.place(config.parallel, world_size, rank)
        module = modules(*(Axis(mesh[axis].size, mesh[axis].index) for axis in ("tp", "pp", "ep")))
        fragments = list(state_of_rank(config, module, mesh))
        sizes = {
            name: len(file_header(tensors)) + sum(map(num_bytes, tensors.values()))
            for name, tensors in rank_files(rank, fragments).items()
        }
        entries = {name: {"bytes": size, "xxh3_64": "0" * 16} for name, size in sizes.items()}
        json[note_path(Path(), rank).as_posix()] = len(note_text(entries, fragments))
        described.append(describe_fragments(fragments))
        files.update(sizes)
        manifest.update(entries)
        written.append(sum(sizes.values()))
        kinds = kinds_of(config, module)
        copied = (part for part in planned_fragments(config, module, mesh) if is_copy(part.parameter, mesh))
        copies.append(sum(4 * len(kinds[part.parameter]) * part.valid for part in copied))
    started = time.perf_counter()
    index = index_text(document_head(config, 1), described)
    seconds = time.perf_counter() - started
    for name, size in (("index.json", len(index)), ("trainer.json", 500)):
        manifest[name] = {"bytes": size, "sha256": "0" * 64}
    json |= {"index.json": len(index), "manifest.json": len(manifest_text(manifest))}
    parameters = sum(sum(pieces["stops"]) - sum(pieces["starts"]) for pieces in described)
    return CheckpointPlan(parameters, written, copies, files, json, seconds)


def state_of_rank(config: Config, module: nn.Module, mesh: Mesh) -> Iterator[StateFragment]:
    """What `Engine.local_state` would yield, on the meta device."""
    kinds = kinds_of(config, module)
    for fragment in planned_fragments(config, module, mesh):
        if not is_copy(fragment.parameter, mesh) and fragment.valid:
            values = torch.empty(fragment.valid, device="meta")
            yield StateFragment(fragment.shard, fragment.start, dict.fromkeys(kinds[fragment.parameter], values))
    if mesh["dp_cp"].index == mesh["tp"].index == 0:
        for spec, buffer in saved_buffers(module):
            yield StateFragment(spec, 0, {KINDS[0]: buffer.flatten()})


def kinds_of(config: Config, module: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """What is saved of every parameter."""
    groups = parameter_groups(module.parameters(), 0.0, config.phase.optimizer)
    return {parameter: (KINDS[0], *moments_of(group)) for group in groups for parameter in group["params"]}


def planned_fragments(config: Config, module: nn.Module, mesh: Mesh) -> Iterator[Fragment]:
    """`fragments` of a rank whose optimizer does not exist, by DeepSpeed's rules for its partitions."""
    ranges: dict[nn.Parameter, tuple[int, int]] = {}
    for group in parameter_groups(module.parameters(), 0.0, config.phase.optimizer):
        axis = mesh["expert_dp" if group.get("moe") else "dp_cp"]
        partition = -(-sum(parameter.numel() for parameter in group["params"]) // (2 * axis.size)) * 2  # of equal sizes
        first = partition * axis.index
        for parameter in group["params"]:
            size = parameter.numel()
            if config.zero_stage == 3:
                first = -(-size // axis.size) * axis.index
                ranges[parameter] = (first, first + -(-size // axis.size))
            else:
                ranges[parameter] = (max(0, first), min(size, first + partition))
                first -= size
    nothing = torch.empty(0, device="meta")
    for parameter in module.parameters():
        start, stop = ranges[parameter]
        if start < stop:
            yield from by_part(parameter, start, stop - start, nothing, 0)


def stage_module(config: Config, tp: Axis, pp: Axis, ep: Axis) -> nn.Module:
    """What a rank at these places holds, its parameters in the engine's order, on the meta device."""
    mesh = Mesh({name: Axis() for name in AXES} | {"tp": tp, "pp": pp, "ep": ep}, device=torch.device("meta"))
    with mesh.device:
        if pp.size == 1:
            module: nn.Module = MODELS[config.model.objective](config.model, mesh)
        else:
            layers = _stage_layers(config, mesh)
            layers.sort(key=lambda layer: layer.tied is None)  # PipelineModule makes those first
            module = nn.ModuleList(layer.cls(**layer.kwargs) for layer in layers)
    if pp.index and config.model.tie_word_embeddings:
        for parameter in module.parameters():
            parameter.ds_pipe_replicated = shard_of(parameter).name == "embedding.weight"  # type: ignore[attr-defined]
    for layer in moe_layers(module) if ep.size > 1 else ():
        for parameter in layer.experts.parameters():
            parameter.group_name = f"ep_size_{ep.size}"  # type: ignore[attr-defined]  # as train/expert_groups.py does
    return module


def _stage_layers(config: Config, mesh: Mesh) -> list[Layer]:
    """Of one pipeline stage: an equal share of the blocks, the first ones one more; the ends with the outer stages."""
    layers = layer_list(config.model, Initializer(mesh, 0, config.model.initializer_range))
    pp, blocks = mesh["pp"], [i for i, layer in enumerate(layers) if issubclass(layer.cls, Block)]
    share, more = divmod(len(blocks), pp.size)
    cuts = [blocks[0] + stage * share + min(stage, more) for stage in range(pp.size + 1)]
    cuts[0], cuts[-1] = 0, len(layers)
    return layers[cuts[pp.index] : cuts[pp.index + 1]]


HEADER = (
    f"{'':12}{'10^9':>7}{'ranks':>6}  {'layout':24}{'GB':>8}{'files':>7}{'per folder':>11}{'index MB':>9}{'GB/rank':>8}"
    f"{'save s':>8}{'pause s':>8}{'load s':>8}"
)


def row(name: str, config: Config, world_size: int, rates: Rates) -> str:
    """A line of the table under HEADER. Raises ConfigError where the layout does not fit the ranks."""
    parallel = config.parallel
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % (model_parallel * parallel.context_parallel_size):
        config.plan(world_size)  # says what would fit
    found = plan_checkpoint(config, world_size)
    layout = (
        f"tp {parallel.tensor_model_parallel_size} pp {parallel.pipeline_model_parallel_size} dp "
        f"{world_size // model_parallel // parallel.context_parallel_size} ZeRO-{config.zero_stage}"
    )
    sizes = (sum(found.written) / 1e9, found.json["index.json"] / 1e6, max(found.written) / 1e9)
    return (
        f"{name:12}{found.parameters / 1e9:7.2f}{world_size:6}  {layout:24}{sizes[0]:8.1f}{len(found.files) + 3:7}"
        f"{found.most_files_in_a_folder:11}{sizes[1]:9.2f}{sizes[2]:8.2f}{found.save_seconds(rates):8.1f}"
        f"{found.pause_seconds(rates):8.2f}{found.load_seconds(rates):8.1f}"
    )


def standard_rows() -> Iterator[tuple[str, Config, int]]:
    """What the table has without a configuration: SHAPES on 8 to 1,024 ranks, in two layouts each."""
    for shape in SHAPES:
        for world in (8, 64, 1024):
            yield shape, standard_config(shape, {"tensor_model_parallel_size": 8}, 1), world
            yield shape, standard_config(shape, {}, 3), world


def standard_config(shape: str, parallel: Mapping[str, int], stage: int) -> Config:
    """One of SHAPES in a layout."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "neomoba": {
            "model": {"num_key_value_heads": 8, "objective": "clm", **SHAPES[shape]},
            "parallel": dict(parallel),
            "data": {"train": "-"},
            "phase": {
                "name": shape,
                "steps": 1,
                "sequence_length": 4096,
                "tokens_per_update": 1 << 22,
                "learning_rate": 1e-4,
            },
        },
    }
    return parse_config(settings, source=shape)
