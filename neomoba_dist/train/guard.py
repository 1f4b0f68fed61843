"""Checks while training runs, each of which ends the run with one line."""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from neomoba_dist.data.batch import Batch
from neomoba_dist.data.errors import DataError
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh


def code_fingerprint() -> str:
    """sha256 of the library's sources, hexadecimal: equal where the same code runs."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def update_crc32(batches: Sequence[Batch]) -> int:
    """crc32 over all tensors of an update's micro-batches, which lie on the CPU."""
    crc32 = 0
    for batch in batches:
        for value in vars(batch).values():
            if isinstance(value, torch.Tensor):
                crc32 = zlib.crc32(value.numpy().data, crc32)
    return crc32


def require_equal_batches(batches: Sequence[Batch], mesh: Mesh) -> None:
    """Refuses to train where the ranks of one model-parallel group (tp, cp, pp) do not hold the same update.

    Each rank makes its group's batches by itself; this is the proof that they are the same. DataError on all ranks.
    Collective over the world.
    """
    crc32, dp = update_crc32(batches), mesh["dp"]
    table = torch.full((dp.size, 2), 1 << 32, dtype=torch.int64, device=mesh.device)
    table[dp.index] = torch.tensor([crc32, -crc32], device=mesh.device)
    least, negative_most = all_reduce(table, mesh, "world", op="min").unbind(1)
    different = torch.nonzero(least != -negative_most).flatten().tolist()
    if different:
        raise DataError(
            f"the ranks of data-parallel group {', '.join(map(str, different))} hold different batches of the same "
            "step; make sure that all machines see the same neomoba.data.train and run the same version"
        )
