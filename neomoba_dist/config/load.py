"""Read one JSON file, apply overrides, check it, and return a Config."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.schema import BLOCKS, Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the resolved configuration of the JSON at `path`.

    `overrides` are "path.to.key=value" strings rooted at the JSON's root; the value is read as JSON, else as a string.
    Raises ConfigError with one line for anything that cannot be used.
    """
    try:
        tree = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: invalid JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Return the Config of a parsed JSON `tree`; `source` names it in errors."""
    ours = tree.get("neomoba", {})
    blocks = {}
    for name, cls in BLOCKS.items():
        given = ours.get(name, {})
        for key in given:
            if key not in {field.name for field in dataclasses.fields(cls)}:
                raise ConfigError(f"{source}: unknown key neomoba.{name}.{key}")
        blocks[name] = cls(**given)
    deepspeed = {key: value for key, value in tree.items() if key != "neomoba"}
    return Config(deepspeed=deepspeed, source=source, **blocks)
