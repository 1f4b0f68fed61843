"""From a JSON file to a Config: read, apply overrides, check every key, build the dataclasses, check the rules."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from neomoba_dist.config.check import check_node, child, describe, dotted, show
from neomoba_dist.config.deepspeed_keys import DEEPSPEED_KEYS
from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.root import BLOCKS, DEFAULT_GRADIENT_CLIPPING, Config
from neomoba_dist.config.rules import check_rules
from neomoba_dist.config.types import Block, Node

KNOWN_KEYS: Final[Block] = {
    "neomoba": {name: typing.get_type_hints(cls, include_extras=True) for name, cls in BLOCKS.items()},
    **DEEPSPEED_KEYS,
}


def load_config(path: str | Path, overrides: Sequence[str] = (), model: Mapping[str, Any] | None = None) -> Config:
    """Return the resolved configuration of the JSON file at `path`.

    `overrides` are "path.to.key=value" strings rooted at the JSON's root; the value is read as JSON, else as a string.
    `model`: keys of neomoba.model, for those that the file does not give.
    Raises ConfigError with one line for anything that cannot be used.
    """
    tree = read_tree(path, overrides)
    ours = tree.get("neomoba")
    if model and isinstance(ours, dict) and isinstance(given := ours.get("model", {}), dict):
        ours["model"] = {**model, **given}
    return parse_config(tree, source=str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object of the file with the `overrides`; of its own keys none is checked yet. Raises ConfigError."""
    tree = read_json(Path(path))
    for override in overrides:
        _apply_override(tree, override, str(path))
    return tree


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Return the Config of a parsed JSON `tree` (not changed); `source` names it in errors, which are ConfigError."""
    checked = check_node(KNOWN_KEYS, KNOWN_KEYS, tree, (), source)
    ours = checked.pop("neomoba", {})
    blocks = {name: _build(cls, ours.get(name, {}), ("neomoba", name), source) for name, cls in BLOCKS.items()}
    if "train_micro_batch_size_per_gpu" not in checked:
        raise ConfigError(f"{source}: train_micro_batch_size_per_gpu is missing; add it (rows of one micro-batch)")
    checked.setdefault("gradient_clipping", DEFAULT_GRADIENT_CLIPPING)
    if "stage" not in checked.get("zero_optimization", {}):
        raise ConfigError(f"{source}: zero_optimization.stage is missing; set it to 1, 2 or 3")
    config = Config(deepspeed=checked, source=source, **blocks)
    check_rules(config)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; ConfigError names the line and column of a mistake."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --ds_config takes a JSON file, see ds_configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); --ds_config takes a JSON file") from None
    try:
        tree = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno} column {error.colno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: a number is too long or blocks are nested too deeply") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {show(tree)}; it must be one block of keys: {{...}}")
    _refuse_duplicates(tree, (), str(path))
    return tree


class _Duplicated(dict[str, Any]):
    """A JSON object in which `key` stands twice; json alone would keep the last one silently."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for name, value in pairs:
        if name in block:
            block = _Duplicated(pairs)
            block.key = name
            return block
        block[name] = value
    return block


def _refuse_duplicates(value: Any, path: tuple[str, ...], source: str) -> None:
    if isinstance(value, _Duplicated):
        raise ConfigError(f"{source}: {dotted((*path, value.key))} stands twice; delete one")
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_duplicates(inner, (*path, name), source)


def _apply_override(tree: dict[str, Any], override: str, file: str) -> None:
    """Set one "path.to.key=value" in `tree`; a missing block on the way is made when its key is known."""
    source = f"--set {override}"
    key, separator, text = override.partition("=")
    names = tuple(key.strip().split("."))
    if not separator or not all(names):
        raise ConfigError(f"{source}: write path.to.key=value, for example neomoba.phase.steps=100")
    node: Node = KNOWN_KEYS
    for depth, name in enumerate(names):
        if not isinstance(node, Mapping):
            raise ConfigError(
                f"{source}: {dotted(names[:depth])} holds a value ({describe(node)}), not a block of keys"
            )
        node = child(KNOWN_KEYS, node, names[:depth], name, source)
    value = check_node(KNOWN_KEYS, node, _override_value(text, node), names, source)
    block = tree
    for depth, name in enumerate(names[:-1], start=1):
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise ConfigError(f"{file}: {dotted(names[:depth])} is {show(block)}; it must be a block of keys: {{...}}")
    block[names[-1]] = value


def _override_value(text: str, node: Node) -> Any:
    """Return `text` read as JSON, else as a string; a key that takes any string keeps a number as it was typed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    takes_string = node is str or str in typing.get_args(node)
    return text if takes_string and isinstance(value, int | float) else value


def _build(cls: type, given: Mapping[str, Any], path: tuple[str, ...], source: str) -> Any:
    """Return the dataclass `cls` from a checked block; ConfigError names a required key that is not there."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            name = dotted((*path, field.name))
            raise ConfigError(f"{source}: {name} is missing; it must be {describe(hints[field.name])}")
    return cls(**given)
