"""Folders of the Hugging Face hub: read as checkpoints, slice by slice, and written from checkpoints of any layout.

A folder is config.json, model.safetensors or its parts with model.safetensors.index.json, and a tokenizer. Only
safetensors are read: nothing is unpickled, no code of the folder is run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neomoba_dist.checkpoint.convert import (
    FILE_BYTES,
    WholeTensor,
    new_folder,
    read_whole,
    require_new,
    write_run,
    write_tensors,
)
from neomoba_dist.checkpoint.files import write_text
from neomoba_dist.checkpoint.hf_families import FAMILIES, describe
from neomoba_dist.checkpoint.hf_family import Source
from neomoba_dist.checkpoint.index import Entry
from neomoba_dist.checkpoint.layout import CheckpointError, logical_name, read_json
from neomoba_dist.checkpoint.load import OPEN_FILES, CheckpointReader
from neomoba_dist.checkpoint.verify import refuse_damage
from neomoba_dist.config import Config, ModelConfig, parse_config
from neomoba_dist.config.paths import is_file_name
from neomoba_dist.data.chat import SETTINGS_FILE, TEMPLATE_FILE, ChatTemplate
from neomoba_dist.data.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, Tokenizer
from neomoba_dist.model.init import ShardedTensorSpec

INDEX = "model.safetensors.index.json"
MODELING = Path(__file__).with_name("modeling_neomoba.py")  # travels with a model that no published format has
LEFT_OUT = {"decoder.bias"}  # NeoBERT's head has a bias, ours has none


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """A checkpoint of ours, or a folder of the hub, by what lies there. Raises CheckpointError."""
    file = Path(path) / "config.json"
    return HuggingFaceReader(path) if file.is_file() and "model_type" in read_json(file) else CheckpointReader(path)


class HuggingFaceReader(CheckpointReader):
    """A folder of the hub, read as the weights of a checkpoint, in float32. Raises CheckpointError."""

    has_checksums = False

    def __init__(self, path: Path | str) -> None:
        self.folder = Path(path)
        config = read_json(self.folder / "config.json")
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise CheckpointError(
                f"{self.folder}: model_type {kind!r} is not read here; {', '.join(FAMILIES)} are (docs/huggingface.md)"
            )
        try:
            keys = FAMILIES[kind].to_model(config)
        except KeyError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error} is missing") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        self.index: dict[str, Any] = {"version": 0, "step": 0, "config": _config_tree(keys, self.folder)}
        self.family = FAMILIES[kind]
        self.sources = self.family.sources(self.config.model)
        self._open_file = lru_cache(OPEN_FILES)(self._opened)
        self._files = self._where()
        self._check_names()
        self.tensors = {
            logical_name("model", name): Entry("model", name, self._shape(source), "float32", ())
            for name, source in self.sources.items()
        }

    def read(self, kind: str, shard: ShardedTensorSpec) -> torch.Tensor:
        self._entry(kind, shard)
        source = self.sources[shard.name]
        if source.zeros is not None:
            return torch.zeros(shard.extent)
        where = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.extent, strict=True))
        if source.stacked:
            return torch.stack([self._slice(name, where[1:]) for name in source.names[where[0]]])
        if source.rows is None:
            return self._slice(source.names[0], where)
        return self._slice(source.names[0], (slice(None), *where[1:]))[source.rows[where[0]]]

    def read_range(self, kind: str, shard: ShardedTensorSpec, start: int, out: torch.Tensor) -> None:
        out.copy_(self.read(kind, shard).flatten()[start : start + out.numel()])

    def trainer(self) -> dict[str, Any]:
        return {"world_size": 1}

    def left_out(self) -> list[str]:
        """Tensors of the folder that no layer of ours has a place for, none that a logit depends on but by a bias."""
        return sorted((LEFT_OUT & self._files.keys()) - self._wanted())

    def _where(self) -> dict[str, str]:
        """Tensor -> file."""
        index = self.folder / INDEX
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not all(is_file_name(file) for file in found.values()):
                raise CheckpointError(f"{index}: weight_map is no table of tensors and file names")
            return found
        file = self.folder / "model.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{self.folder}: neither {INDEX} nor model.safetensors is there; only they are read")
        return dict.fromkeys(self._open_file(file.name).keys(), file.name)

    def _wanted(self) -> set[str]:
        """Tensors of the folder that ours lie in."""
        return {name for source in self.sources.values() for name in source.names}

    def _check_names(self) -> None:
        """Every tensor of ours is there, and nothing else that would be lost without a word."""
        wanted = self._wanted()
        known = wanted | LEFT_OUT | {name for name in self._files if name.endswith("rotary_emb.inv_freq")}
        if self.config.model.tie_word_embeddings:
            known |= {self.family.output}
        if missing := sorted(wanted - self._files.keys()):
            raise CheckpointError(f"{self.folder}: holds no tensor {missing[0]}, as its config.json says it should")
        if surplus := sorted(self._files.keys() - known):
            raise CheckpointError(f"{self.folder}: tensor {surplus[0]} has no counterpart here")

    def _shape(self, source: Source) -> tuple[int, ...]:
        if source.zeros is not None:
            return source.zeros
        shape = tuple(self._open_file(self._files[source.names[0]]).get_slice(source.names[0]).get_shape())
        if source.stacked:
            return (len(source.names), *shape)
        return shape if source.rows is None else (len(source.rows), *shape[1:])

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error}); download it again") from error

    def _slice(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        try:
            return self._open_file(self._files[name]).get_slice(name)[where].to(torch.float32)
        except (SafetensorError, IndexError) as error:
            raise CheckpointError(f"{self.folder / self._files[name]}: {name} cannot be read ({error})") from error


def _config_tree(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration with this model block; the rest says that nothing was trained."""
    phase = {"name": folder.name or "hub", "steps": 1, "sequence_length": min(1024, model["max_position_embeddings"])}
    phase |= {"tokens_per_update": phase["sequence_length"], "learning_rate": 1e-4}
    neomoba = {"model": model, "data": {"train": str(folder)}, "phase": phase}
    tree = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "neomoba": neomoba}
    return parse_config(tree, source=str(folder / "config.json")).to_dict()


def import_folder(reader: HuggingFaceReader, output: Path, file_bytes: int = FILE_BYTES) -> Path:
    """Write a folder of the hub as a run folder that holds one export (weights alone); returns the export.

    In memory are at most `file_bytes`, or the largest tensor. Raises CheckpointError.
    """
    final = write_run(reader, output, file_bytes=file_bytes)
    for name in (TOKENIZER_JSON, TOKENIZER_MODEL, SETTINGS_FILE, TEMPLATE_FILE):
        if (reader.folder / name).is_file():
            shutil.copyfile(reader.folder / name, output / name)
    return final


def export_folder(
    reader: CheckpointReader,
    output: Path,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    file_bytes: int = FILE_BYTES,
    template: ChatTemplate | None = None,
) -> Path:
    """Write a checkpoint of any layout as a folder of the hub, tensor by tensor; returns it. Raises CheckpointError.

    template: of a model that answers; goes beside the tokenizer, which it belongs to.
    """
    require_new(output)
    config: Config = reader.config
    try:
        name, described = describe(config.model)
    except CheckpointError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from error
    refuse_damage(reader.folder, ("model",))
    if tokenizer is not None:
        roles = {f"{role}_token_id": number for role, number in asdict(tokenizer.special).items()}
        described |= {key: number for key, number in roles.items() if key in described}
    described["dtype"] = described["torch_dtype"] = str(dtype).removeprefix("torch.")
    with new_folder(output) as writing:
        parts = _their_tensors(reader, FAMILIES[name].sources(config.model), dtype)
        where = write_tensors(parts, writing, file_bytes, {"format": "pt"})
        total = sum(file.stat().st_size for file in writing.iterdir())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(writing / INDEX, json.dumps(index, indent=1) + "\n")
        write_text(writing / "config.json", json.dumps(described, indent=1) + "\n")
        if name == "neomoba":
            shutil.copyfile(MODELING, writing / MODELING.name)
            write_text(writing / "README.md", _card(reader))
        if tokenizer is not None:
            tokenizer.save(writing)
            settings = _tokenizer_config(tokenizer, config.model) | (template.settings if template else {})
            write_text(writing / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        if template is not None and template.end_of_turn is not None:
            text = json.dumps({"eos_token_id": template.end_of_turn})
            write_text(writing / "generation_config.json", text + "\n")
    return output


def _card(reader: CheckpointReader) -> str:
    """README.md of a folder that brings its own code."""
    model = reader.config.model
    kind = "AutoModelForCausalLM" if model.causal else "AutoModelForMaskedLM"
    sparse = model.layer_attentions.count("moba")
    return f"""---
library_name: transformers
tags: [moba, {"text-generation" if model.causal else "fill-mask"}]
---

A {"decoder" if model.causal else "bidirectional encoder"} of {model.num_hidden_layers} layers, trained with
NeoMoBA-Dist: step {reader.index["step"]} of phase {reader.config.phase.name}. {sparse} layers attend by MoBA (blocks of
{model.moba_block_size} tokens, the best {model.moba_top_k}), the others to everything.

```python
from transformers import {kind}

model = {kind}.from_pretrained("THIS FOLDER", trust_remote_code=True)
```
"""


def _tokenizer_config(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    """What `AutoTokenizer` wants to know beside the tokenizer's own file."""
    roles = {f"{role}_token": number for role, number in asdict(tokenizer.special).items() if number is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_position_embeddings,
        **{role: tokenizer.token(number) for role, number in roles.items()},
    }


def _their_tensors(reader: CheckpointReader, sources: dict[str, Source], dtype: torch.dtype) -> Iterator[WholeTensor]:
    """Their tensors in the order of ours; what is put together of several of ours comes with the last of them."""
    parts: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source.rows is not None:
            parts.setdefault(source.names[0], []).append(name)

    def shape(name: str) -> tuple[int, ...]:
        return reader.tensors[logical_name("model", name)].shape

    def whole(name: str) -> torch.Tensor:
        return read_whole(reader, logical_name("model", name))

    def expert(name: str, number: int) -> torch.Tensor:
        start, extent = (number, *[0] * (len(shape(name)) - 1)), (1, *shape(name)[1:])
        return reader.read("model", ShardedTensorSpec(name, shape(name), start, extent))[0]

    def together(names: list[str]) -> torch.Tensor:
        made = torch.empty(sum(shape(name)[0] for name in names), *shape(names[0])[1:])
        for name in names:
            made[sources[name].rows] = whole(name)
        return made

    def part(theirs: str, numbers: int, read: Callable[[], torch.Tensor]) -> WholeTensor:
        return WholeTensor(theirs, numbers * dtype.itemsize, lambda: read().to(dtype).contiguous())

    for name, source in sources.items():
        if source.zeros is not None:
            if whole(name).any():
                raise CheckpointError(f"{reader.folder}: {name} is not zero, and the hub's format has no place for it")
        elif source.stacked:
            for number, theirs in enumerate(source.names):
                yield part(theirs, math.prod(shape(name)[1:]), partial(expert, name, number))
        elif source.rows is None:
            yield part(source.names[0], math.prod(shape(name)), partial(whole, name))
        elif name == parts[source.names[0]][-1]:
            names = parts[source.names[0]]
            yield part(source.names[0], sum(math.prod(shape(other)) for other in names), partial(together, names))
