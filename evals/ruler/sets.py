"""The thirteen tasks of RULER as its `scripts/synthetic.yaml` sets them, and what a sample is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

DEFAULT_SAMPLES: Final = 500
DEFAULT_SEED: Final = 42


@dataclass(frozen=True)
class RulerTask:
    """kind: the generator. generated: tokens of the answer. metric: share of references found, "all", or any, "part".

    haystack: "noise", "essay" or "needle". keys, values, queries: how many needles; key_type, value_type: "words",
    "numbers" or "uuids". dataset: the file of questions.
    """

    kind: str
    generated: int
    metric: str = "all"
    haystack: str = "noise"
    key_type: str = "words"
    value_type: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    dataset: str = ""


def _niah(haystack: str, **more: Any) -> RulerTask:
    return RulerTask("niah", 128, haystack=haystack, **more)


RULER_TASKS: Final = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value_type="uuids"),
    "niah_multikey_1": _niah("essay", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": _niah("essay", values=4),
    "niah_multiquery": _niah("essay", keys=4, queries=4),
    "vt": RulerTask("variable_tracking", 30),
    "cwe": RulerTask("common_words_extraction", 120),
    "fwe": RulerTask("freq_words_extraction", 50),
    "qa_1": RulerTask("qa", 32, metric="part", dataset="squad"),
    "qa_2": RulerTask("qa", 32, metric="part", dataset="hotpotqa"),
}


@dataclass(frozen=True)
class Draft:
    """A sample of which only the amount of haystack is open.

    compose: size, at least `least` -> the whole prompt, which ends with `prefix`; draws nothing, so that fitting a
    sample changes nothing else. Sizes count the smallest parts that a haystack can be cut into. more: extra fields.
    """

    compose: Callable[[int], str]
    prefix: str
    outputs: list[str]
    least: int = 0
    more: dict[str, Any] = field(default_factory=dict)
