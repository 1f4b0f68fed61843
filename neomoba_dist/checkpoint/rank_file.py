"""The file of one rank: safetensors, written tensor by tensor, so that no second copy of the state is ever in memory.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header, the
header, the data. The package itself copies everything before it writes; its readers read this file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
CHUNK_BYTES = 1 << 25


@dataclass(frozen=True)
class Written:
    """A finished file: bytes and checksum (xxh3, 64 bits, hexadecimal)."""

    bytes: int
    xxh3_64: str


def write_rank_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write flat contiguous tensors of any device and flush them to disk. Raises OSError."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum = xxhash.xxh3_64()
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            checksum.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in _chunks(tensor.detach()):
                put(chunk)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return Written(size, checksum.hexdigest())


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a flat tensor, some at a time; from a GPU through one small buffer."""
    step = CHUNK_BYTES // tensor.element_size()
    for start in range(0, tensor.numel(), step):
        part = tensor[start : start + step].cpu().contiguous()
        yield part.numpy().data.cast("B")


def checksum_of(path: Path) -> Written:
    """Size and checksum of a file on disk. Raises OSError."""
    checksum, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
    return Written(size, checksum.hexdigest())
