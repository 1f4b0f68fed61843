"""index.json: in which files the elements of every logical tensor lie, as rank 0 writes it and all ranks read it.

A tensor is one or more rectangles, what one tensor- or expert-parallel rank computes with; each is flattened and cut
over the ranks that hold it, under ZeRO-3 over all of them. The table has two numbers for each of these pieces, and a
reader finds its own by bisection: none of it is expanded.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neomoba_dist.checkpoint.layout import (
    FORMAT,
    VERSION,
    Box,
    CheckpointError,
    DamageError,
    boxes_of_part,
    file_name,
    logical_name,
    read_json,
)
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.config.paths import is_file_name


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of the flattened part `offset`, `shape` of a logical tensor: `key` of `file`, from 0 on."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    def boxes(self) -> Iterator[Box]:
        """The rectangles that the elements fill; their offsets in the logical tensor, their bases in the stored key."""
        return boxes_of_part(self.offset, self.shape, self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor. Flattened, its elements cuts[i] to cuts[i + 1] lie with holders[i].

    holders: ranks; in version 1 pairs of file and key.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    cuts: Sequence[int]
    holders: Sequence[Any]


@dataclass(frozen=True)
class Entry:
    """A logical tensor: its whole shape, the name of its dtype, the parts that fill it."""

    kind: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    ranks_per_folder: int | None = None

    def pieces(self, wanted: Box) -> Iterator[Piece]:
        """The stored pieces that may hold something of a rectangle of the tensor."""
        for part in self.parts:
            begin = [max(0, a - b) for a, b in zip(wanted.offset, part.offset, strict=True)]
            last = [
                min(a + n - b, m) - 1
                for a, n, b, m in zip(wanted.offset, wanted.shape, part.offset, part.shape, strict=True)
            ]
            if any(e < b for b, e in zip(begin, last, strict=True)):
                continue
            low, high = (_position(place, part.shape) for place in (begin, last))
            yield from self.range_of(part, low, high + 1)

    def part_at(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> Part | None:
        """The part that is this rectangle, if one is."""
        return next((part for part in self.parts if (part.offset, part.shape) == (offset, shape)), None)

    def range_of(self, part: Part, start: int, stop: int) -> Iterator[Piece]:
        """The pieces that hold the elements start..stop of a flattened part."""
        for i in range(bisect_right(part.cuts, start) - 1, bisect_left(part.cuts, stop)):
            file, key = self._place(part.holders[i])
            yield Piece(file, key, part.offset, part.shape, part.cuts[i], part.cuts[i + 1])

    def files(self) -> set[str]:
        """All files that hold something of the tensor."""
        return {self._place(holder)[0] for part in self.parts for holder in part.holders}

    def _place(self, holder: Any) -> tuple[str, str]:
        if isinstance(holder, int):
            return file_name(self.kind, holder, self.ranks_per_folder), self.key
        file, key = holder
        return file, key


def _position(place: Sequence[int], shape: Sequence[int]) -> int:
    """Of an element in the flattened rectangle."""
    position = 0
    for index, length in zip(place, shape, strict=True):
        position = position * length + index
    return position


def describe_fragments(fragments: Iterable[StateFragment]) -> dict[str, list[Any]]:
    """What a rank's note says of its pieces, in columns: part of a tensor, first element, end.

    A part is one text: of a thousand ranks' notes rank 0 would else make millions of lists, over which Python's garbage
    collector holds up training.
    """
    parts, starts, stops = [], [], []
    for spec, start, values in fragments:
        first = next(iter(values.values()))
        numbers = (",".join(map(str, numbers)) for numbers in (spec.shape, spec.start, spec.extent))
        dtype = str(first.dtype).removeprefix("torch.")
        parts.append(";".join([spec.name, dtype, ",".join(values), *numbers]))
        starts.append(start)
        stops.append(start + first.numel())
    return {"parts": parts, "starts": starts, "stops": stops}


def index_text(document: Mapping[str, Any], described: Iterable[Mapping[str, list[Any]]]) -> str:
    """index.json from what the ranks say of their pieces. Raises CheckpointError where these leave a gap or overlap.

    A line per tensor: readable, and small where every tensor lies in a thousand pieces.
    """
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for rank, pieces in enumerate(described):
        for part, start, stop in zip(pieces["parts"], pieces["starts"], pieces["stops"], strict=True):
            columns = found.get(part) or found.setdefault(part, ([], [], []))
            for column, number in zip(columns, (start, stop, rank), strict=True):
                column.append(number)
    tensors: dict[str, dict[str, Any]] = {}
    for part, columns in found.items():
        name, dtype, kinds, *numbers = part.split(";")
        shape, offset, extent = ([int(number) for number in text.split(",") if number] for text in numbers)
        starts, stops, ranks = zip(*sorted(zip(*columns, strict=True)), strict=True)
        if starts != (0, *stops[:-1]) or stops[-1] != math.prod(extent):
            raise CheckpointError(f"{name}: the ranks' parts leave a gap or overlap; nothing was saved")
        entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "kinds": kinds.split(","), "parts": []})
        entry["parts"].append({"offset": offset, "shape": extent, "cuts": [0, *stops], "ranks": ranks})
    for entry in tensors.values():
        entry["parts"].sort(key=lambda part: part["offset"])
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in sorted(tensors.items())
    )
    head = json.dumps(document, indent=1)
    return f'{head[:-2]},\n "tensors": {{\n{lines}\n }}\n}}\n'


def read_index(folder: Path) -> dict[str, Any]:
    """index.json; its format and version are checked. Raises CheckpointError."""
    index = read_json(folder / "index.json")
    if index.get("format") != FORMAT or index.get("version") not in (1, VERSION):
        raise CheckpointError(f"{folder / 'index.json'}: not a checkpoint of format {FORMAT} version {VERSION} or 1")
    return index


def tensor_entries(index: dict[str, Any], folder: Path) -> dict[str, Entry]:
    """The logical tensors of an index, by logical name. Raises CheckpointError where it is no such table."""
    try:
        entries = _entries_of_version_1(index) if index["version"] == 1 else _entries(index)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamageError(f"{folder / 'index.json'}: not a table of tensors ({error!r})") from error
    for name, entry in entries.items() if index["version"] == 1 else ():  # later ones give ranks, not names
        for file in entry.files():
            if not is_file_name(file):
                raise CheckpointError(
                    f"{folder / 'index.json'}: {name} lies in {file!r}, which is no plain file name; do not use this "
                    "checkpoint"
                )
    return entries


def _entries(index: dict[str, Any]) -> dict[str, Entry]:
    """All kinds of a tensor share their geometry, so it stands once in the file, and here."""
    entries, per_folder = {}, index.get("ranks_per_folder")
    for name, found in index["tensors"].items():
        parts = []
        for part in found["parts"]:
            cuts, ranks = part["cuts"], part["ranks"]
            whole = [cuts[0], cuts[-1], len(cuts)] == [0, math.prod(part["shape"]), len(ranks) + 1]
            if not whole or cuts != sorted(cuts) or not all(isinstance(rank, int) for rank in ranks):
                raise ValueError(name)
            parts.append(Part(tuple(part["offset"]), tuple(part["shape"]), cuts, ranks))
        for kind in found["kinds"]:
            key = logical_name(kind, name)
            entries[key] = Entry(kind, key, tuple(found["shape"]), found["dtype"], tuple(parts), per_folder)
    return entries


def _entries_of_version_1(index: dict[str, Any]) -> dict[str, Entry]:
    """One tensor-parallel rank's whole part per piece, stored in its own shape."""
    entries = {}
    for name, found in index["tensors"].items():
        parts = []
        for piece in found["pieces"]:
            shape = tuple(piece["shape"])
            parts.append(Part(tuple(piece["offset"]), shape, (0, math.prod(shape)), [(piece["file"], piece["key"])]))
        kind = name.removeprefix("optimizer.").partition(".")[0]
        entries[name] = Entry(kind, name, tuple(found["shape"]), found["dtype"], tuple(parts))
    return entries
