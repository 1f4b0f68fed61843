"""The file of one rank: safetensors, written tensor by tensor and read slice by slice, straight from and to the state.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header, the
header, the data. The package itself copies everything before it writes, and reads through a mapping of the file, whose
page faults cost more than the disk; its readers read this file, and this one reads theirs.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
CHUNK_BYTES = 1 << 20  # stays in a core's cache between checksum and disk
COPY_BYTES = 1 << 25  # of a GPU's memory at a time
STREAMS = 4  # files that a process reads at a time


@dataclass(frozen=True)
class Written:
    """A finished file: bytes and checksum (xxh3, 64 bits, hexadecimal)."""

    bytes: int
    xxh3_64: str


def write_rank_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write flat contiguous tensors of any device and flush them to disk. Raises OSError."""
    checksum = xxhash.xxh3_64()
    with open(path, "wb") as file:
        for chunk in _chunks(tensors):
            checksum.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return Written(size, checksum.hexdigest())


def file_header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """What stands before the data of these tensors, whose shapes and dtypes alone are looked at."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Slice(NamedTuple):
    """Elements of a stored key from `start` on, and the flat contiguous tensor, of any device, that they fill."""

    key: str
    start: int
    out: torch.Tensor


class RankFile:
    """A file opened for reading. Raises OSError, and ValueError where it is no safetensors file."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if length > size - 8:
            raise ValueError("its header is cut")
        self._header = json.loads(self._file.read(length))
        if not isinstance(self._header, dict):
            raise ValueError("its header is no JSON object")
        self._data = (8 + length, size)

    def read(self, part: Slice) -> None:
        """Fill the tensor of `part`. Raises OSError, and ValueError where the file does not hold all of it."""
        start, _ = self._place(part)
        for _ in self._fill(start, part.out):
            pass

    def read_whole(self, parts: Iterable[Slice]) -> str:
        """Read every byte of the file once, those of the parts into their tensors; its checksum, as `checksum_of`'s.

        Until that is known to be right, what the tensors hold is not to be used. Raises as `read`.
        """
        checksum, position = xxhash.xxh3_64(), 0
        places = [(*self._place(part), part) for part in parts]
        for start, stop, part in sorted(places, key=lambda place: place[:2]):
            if start < position:  # bytes of another part as well
                self.read(part)
                continue
            for chunk in self._bytes(position, start):
                checksum.update(chunk)
            for chunk in self._fill(start, part.out):
                checksum.update(chunk)
            position = stop
        for chunk in self._bytes(position, self._data[1]):
            checksum.update(chunk)
        return checksum.hexdigest()

    def _place(self, part: Slice) -> tuple[int, int]:
        """Of the elements in the file: first byte, end."""
        dtype, size = DTYPES[part.out.dtype], part.out.element_size()
        try:
            entry = self._header[part.key]
            found, (begin, end) = entry["dtype"], (self._data[0] + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"holds no {part.key}") from error
        if found != dtype:
            raise ValueError(f"holds no {part.key} of {part.out.dtype}")
        start = begin + part.start * size
        stop = start + part.out.numel() * size
        if not self._data[0] <= begin <= start <= stop <= end <= self._data[1]:
            raise ValueError(f"holds less of {part.key} than wanted")
        return start, stop

    def _bytes(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes start..stop of the file, a chunk at a time, each until the next one is asked for."""
        scratch = memoryview(bytearray(min(CHUNK_BYTES, stop - start)))
        while start < stop:
            chunk = self._read_into(scratch[: stop - start], start)
            yield chunk
            start += len(chunk)

    def _fill(self, start: int, out: torch.Tensor) -> Iterator[memoryview]:
        """The bytes from `start` on with which `out` is filled meanwhile, a chunk at a time."""
        target, position = out.detach().view(torch.uint8), 0
        if target.is_cpu:
            memory = target.numpy().data
            while position < len(memory):
                chunk = self._read_into(memory[position : position + CHUNK_BYTES], start + position)
                yield chunk
                position += len(chunk)
            return
        for chunk in self._bytes(start, start + len(target)):
            target[position : position + len(chunk)].copy_(torch.frombuffer(chunk, dtype=torch.uint8))
            yield chunk
            position += len(chunk)

    def _read_into(self, memory: memoryview, position: int) -> memoryview:
        """What the file gives at once from `position` on, into `memory`: something, or ValueError at its end."""
        read = os.preadv(self._file.fileno(), [memory], position)
        if not read:
            raise ValueError("it is cut")
        return memory[:read]


def _chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of the file, some at a time; from a GPU through one small buffer."""
    yield memoryview(file_header(tensors))
    for tensor in tensors.values():
        for part in tensor.detach().split(COPY_BYTES // tensor.element_size()):
            data = part.cpu().numpy().data.cast("B") if len(part) else memoryview(b"")
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]


def checksum_of(path: Path) -> Written:
    """Size and checksum of a file on disk. Raises OSError."""
    checksum, size, chunk = xxhash.xxh3_64(), 0, memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(chunk):
            checksum.update(chunk[:read])
            size += read
    return Written(size, checksum.hexdigest())
