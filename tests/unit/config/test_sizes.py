"""Absurd sizes: refused at once, in one line, and no check counts for ever within the bounds either."""

import dataclasses
import time
import typing
from typing import Any

import pytest

from neomoba_dist.config import ConfigError
from neomoba_dist.config.deepspeed_keys import DEEPSPEED_KEYS
from neomoba_dist.config.root import BLOCKS
from neomoba_dist.config.types import LARGEST, Range
from tests.configs import build


def bounds_of(annotation: Any) -> Range | None:
    """The bounds of an integer's annotation, of an optional one too."""
    for inner in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(inner) is typing.Annotated and typing.get_args(inner)[0] is int:
            return typing.get_args(inner)[1]
    return None


def integers() -> dict[str, Range]:
    """Dotted path -> bounds of every integer key of both halves."""
    found: dict[str, Any] = {}
    for block, cls in BLOCKS.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        found |= {f"neomoba.{block}.{field.name}": hints[field.name] for field in dataclasses.fields(cls)}
    for name, node in DEEPSPEED_KEYS.items():
        inner = node.items() if isinstance(node, dict) else ()
        found |= {f"{name}.{key}": value for key, value in inner} or {name: node}
    return {path: bounds for path, node in found.items() if (bounds := bounds_of(node))}


KEYS = integers()


def test_every_integer_has_both_bounds() -> None:
    assert {"neomoba.parallel.context_parallel_size", "zero_optimization.reduce_bucket_size"} <= KEYS.keys()
    open_above = [path for path, bounds in KEYS.items() if bounds.le is None and bounds.lt is None]
    assert open_above == []


def outcome(path: str, value: int) -> str | None:
    """The refusal of a configuration with this value, on 8 ranks; None if it is taken. It may take two seconds."""
    start = time.monotonic()
    try:
        build({path: value}).plan(8)
    except ConfigError as error:
        message = str(error)
    else:
        message = None
    assert time.monotonic() - start < 2.0
    assert message is None or "\n" not in message
    return message


@pytest.mark.parametrize("path", KEYS)
@pytest.mark.parametrize("value", [2**40, 10**15, 10**30])
def test_absurd_sizes_are_one_line_at_once(path: str, value: int) -> None:
    bounds, message = KEYS[path], outcome(path, value)
    if bounds.le is not None and value > bounds.le:
        assert message is not None
        assert message.startswith(f"FILE: {path} is ")
        assert f"at most {int(bounds.le)}" in message


@pytest.mark.parametrize("path", KEYS)
def test_the_largest_size_is_checked_at_once(path: str) -> None:
    """A rule may still refuse it."""
    bounds = KEYS[path]
    outcome(path, LARGEST if bounds.le is None else int(bounds.le))


def test_lists_of_layers_too() -> None:
    with pytest.raises(ConfigError, match="is not known; set it to"):
        build({"neomoba.model.attention": "moba*99999999999,full*1"})


def test_align_names_the_nearest_divisor() -> None:
    with pytest.raises(ConfigError, match=r"align 7 does not divide .* 64; set align to 8$"):
        build({"neomoba.data.align": 7})
    length = {"neomoba.phase.sequence_length": 2**30, "neomoba.model.max_position_embeddings": 2**30}
    with pytest.raises(ConfigError, match=r"set align to 536870912$"):
        build({"neomoba.data.align": 600_000_000, "neomoba.phase.tokens_per_update": 2**30, **length})
