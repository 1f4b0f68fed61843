"""Arrays that stay on disk: columns of an .npz file read a stretch at a time, and files of flat arrays to be mapped.

A corpus of a trillion tokens has tables of gigabytes; no process holds them.
"""

from __future__ import annotations

import mmap
import os
import re
import resource
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

MOST_MAPS = 512
_ALIGNMENT = 64
# numpy has Python's parser read this, whose depth CPython 3.11 counts over all threads: with another one parsing, as
# torch.compile does, either raises SystemError
_HEADER = re.compile(
    rb"{'descr': '(?P<dtype>[<>|=]?[a-z]\d+)', 'fortran_order': (?:False|True), 'shape': \((?P<length>\d+),\), } *\n"
)


def maps_at_once(corpora: int = 1) -> int:
    """Shards that each of so many corpora may have mapped: a quarter of the files that this process may open.

    A map keeps its file open. Reading on in a shard that was let go costs an open and a map.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(4, min(MOST_MAPS, files // 4 if files > 0 else MOST_MAPS) // max(1, corpora))


def map_file(path: Path) -> mmap.mmap:
    """The whole file, read when it is touched. OSError or ValueError if it is missing or empty."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def fetch(whole: mmap.mmap, start: int, stop: int) -> None:
    """Have the bytes start..stop of a mapped file read in one go, before they are touched, and no others.

    Around a page that is touched without this the system reads as much as its read-ahead allows, often megabytes.
    """
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if 0 <= first < len(whole):
        whole.madvise(mmap.MADV_WILLNEED, first, stop - first)


class Columns:
    """The arrays of an .npz file as `numpy.savez` writes it, by name; each read from disk when it is asked for."""

    def __init__(self, path: Path) -> None:
        """OSError, ValueError or zipfile.BadZipFile if it is no such file."""
        self.path = path
        self._columns: dict[str, tuple[np.dtype, int, int]] = {}  # dtype, length, byte offset
        self._file = open(path, "rb")  # noqa: SIM115 (read from as long as the table is used)
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{path}: {entry.filename} is compressed")
                self._file.seek(entry.header_offset + 26)  # the lengths of the name and of the extra field
                name, extra = np.frombuffer(self._file.read(4), "<u2").tolist()
                self._file.seek(name + extra, os.SEEK_CUR)
                dtype, length = _header(self._file)
                self._columns[entry.filename.removesuffix(".npy")] = (dtype, length, self._file.tell())

    def length(self, name: str) -> int:
        """Elements of a column."""
        return self._columns[name][1]

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Elements [first, last) of a column."""
        dtype, _, offset = self._columns[name]
        size = (last - first) * dtype.itemsize
        payload = os.pread(self._file.fileno(), size, offset + first * dtype.itemsize)
        while len(payload) < size:  # one call reads at most 2 GiB
            more = os.pread(self._file.fileno(), size - len(payload), offset + first * dtype.itemsize + len(payload))
            if not more:
                raise ValueError(f"{self.path}: ends inside of {name}")
            payload += more
        return np.frombuffer(payload, dtype)

    def mapped(self, name: str) -> np.ndarray:
        """A column as a view of the mapped file."""
        dtype, length, offset = self._columns[name]
        return np.frombuffer(map_file(self.path), dtype, length, offset) if length else np.zeros(0, dtype)


def write_arrays(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    """One-dimensional arrays one after the other, each as numpy.save writes it and aligned for `map_arrays`."""
    for array in arrays:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        np.save(file, array)


def map_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of a file of `write_arrays`, as views of the mapped file. OSError or ValueError if it is none."""
    arrays = []
    whole = map_file(path)
    while whole.tell() < len(whole):
        whole.seek(-whole.tell() % _ALIGNMENT, os.SEEK_CUR)
        dtype, length = _header(whole)  # type: ignore[arg-type]
        arrays.append(np.frombuffer(whole, dtype, length, whole.tell()) if length else np.zeros(0, dtype))
        whole.seek(length * dtype.itemsize, os.SEEK_CUR)
    return arrays


def _header(file: BinaryIO) -> tuple[np.dtype, int]:
    """(dtype, length) of a one-dimensional array that numpy.save wrote; the file then stands at its data."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"array format {version}")
    found = _HEADER.fullmatch(file.read(int.from_bytes(file.read(2), "little")))
    if found is None:
        raise ValueError("not an array of numbers in one dimension")
    return np.dtype(found["dtype"].decode()), int(found["length"])


def write_shared(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes a file of `write_arrays` that others may write, too, with the same content: whole or not at all.

    A process that dies leaves a `.*.tmp` behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        write_arrays(file, arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    try:
        Path(file.name).replace(path)
    except FileNotFoundError:  # swept up by another job, which had no more use for it: the file is there
        if not path.is_file():
            raise
