"""Check a parsed JSON against the known keys: names at every depth, types and ranges. Returns the normalised tree."""

import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.suggest import closest, unknown_key
from neomoba_dist.config.types import LARGEST, Block, Node, Refused

Path = tuple[str, ...]


def dotted(path: Path) -> str:
    """Return the path as the user writes it: "zero_optimization.stage"."""
    return ".".join(path)


def child(root: Block, block: Block, path: Path, name: str, source: str) -> Node:
    """Return what the key `name` of `block` (which stands at `path`) may hold.

    Raises ConfigError when the key is unknown, with the nearest known name of `root`, or when it is refused.
    """
    if name not in block:
        raise ConfigError(f"{source}: {unknown_key(root, block, path, name)}")
    node = block[name]
    if isinstance(node, Refused):
        raise ConfigError(f"{source}: DeepSpeed's key {dotted((*path, name))} is not taken: {node.advice}")
    return node


def check_node(root: Block, node: Node, value: Any, path: Path, source: str) -> Any:
    """Return `value` normalised to what `node` asks for at `path`; ConfigError with one line otherwise."""
    if not isinstance(node, Mapping):
        return check_value(node, value, path, source)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {dotted(path)} is {show(value)}; it must be a block of keys: {{...}}")
    return {
        name: check_node(root, child(root, node, path, name, source), inner, (*path, name), source)
        for name, inner in value.items()
    }


def check_value(annotation: Node, value: Any, path: Path, source: str) -> Any:
    """Return `value` as the type that `annotation` names: 1e5 becomes an int, 1 a float. A bool is never a number."""
    try:
        return _conform(annotation, value)
    except ValueError:
        choices = [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
        near = closest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {show(near)}?" if near else ""
        wanted = describe(annotation)
        if (
            isinstance(value, int | float)
            and value > LARGEST
            and wanted.startswith("an integer")
            and "most" not in wanted
        ):
            wanted += f", and at most {LARGEST}"
        message = f"{source}: {dotted(path)} is {show(value)}; it must be {wanted}{hint}"
        raise ConfigError(message) from None


def _conform(annotation: Node, value: Any) -> Any:
    """Return the converted value or raise ValueError."""
    origin: object = typing.get_origin(annotation)
    if origin is Annotated:
        base, bounds = typing.get_args(annotation)
        converted = _conform(base, value)
        if converted not in bounds:
            raise ValueError
        return converted
    if origin in (Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
        return None if value is None else _conform(inner, value)
    if origin is Literal:
        for choice in typing.get_args(annotation):
            if type(choice) is type(value) and choice == value:
                return value
        raise ValueError
    if origin is list:
        if not isinstance(value, list):
            raise ValueError
        return [_conform(typing.get_args(annotation)[0], item) for item in value]
    return _scalar(annotation, value)


def _scalar(annotation: Node, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value)
    if annotation is int and is_number and value == int(value):
        return int(value)
    if annotation is float and is_number:
        return float(value)
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    raise ValueError


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def describe(annotation: Node) -> str:
    """Return in words what a key must hold: "an integer of at least 1", "true or false"."""
    origin: object = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin in (Union, types.UnionType):
        inner = next(arg for arg in args if arg is not type(None))
        return f"{describe(inner)}, or null"
    if origin is Literal:
        return f"one of {', '.join(show(choice) for choice in args)}"
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[annotation]


def show(value: Any) -> str:
    """Return the value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
