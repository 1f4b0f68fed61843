"""The key `neomoba.data.train`: one folder or url of shards, or several mixed: "runs/web@1024*0.7,runs/books*0.3"."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Final, NamedTuple

_SOURCE: Final = re.compile(r"(?P<location>.+?)(@(?P<length>\d+))?(\*(?P<weight>\d+(\.\d+)?))?", re.ASCII)


class SourceEntry(NamedTuple):
    """One source: its folder or url, the least length in tokens of its documents, its weight."""

    location: str
    min_length: int
    weight: Fraction


def parse_sources(train: str) -> tuple[SourceEntry, ...]:
    """The sources of a value that has no `source_problems`. Weights are exact: only their ratios count."""
    found = []
    for item in train.split(","):
        match = _SOURCE.fullmatch(item.strip())
        assert match, train
        found.append(SourceEntry(match["location"], int(match["length"] or 0), Fraction(match["weight"] or 1)))
    return tuple(found)


def source_problems(train: str) -> Iterator[str]:
    """What is wrong with the value, in words that follow its name."""
    if any(not item.strip() for item in train.split(",")):
        yield "is empty, or has an empty part; give each part a folder or delete it"
    elif any(not source.weight for source in parse_sources(train)):
        yield f'"{train}" gives a source the weight 0; give it more, or delete it'
