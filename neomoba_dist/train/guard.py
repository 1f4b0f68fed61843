"""What the ranks of a run must have alike: how they were started, their batches and their weights.

A difference ends the run on all ranks, with one line that says which ranks differ from the others, and in what.
"""

import hashlib
import json
import platform
import socket
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neomoba_dist.config import ConfigError
from neomoba_dist.data.batch import Batch
from neomoba_dist.errors import FailedError
from neomoba_dist.model.init import ShardedTensorSpec, views_of
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.parallel.comm import all_gather, all_gather_objects
from neomoba_dist.parallel.launcher import gather_from_all
from neomoba_dist.parallel.mesh import Mesh

SHOWN = 8  # ranks, keys or tensors that a line names


class DisagreementError(FailedError):
    """Ranks differ in what they must have alike."""

    on_all_ranks = True


class StartError(ConfigError):
    """Ranks were started differently."""

    on_all_ranks = True


def code_fingerprint() -> str:
    """sha256 of the library's sources, hexadecimal: equal where the same code runs."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What computes: the library's sources, Python and the libraries below."""
    packages = ("torch", "deepspeed", "megatron-core", "numpy")
    return {
        "version of neomoba_dist": code_fingerprint()[:16],
        "version of python": platform.python_version(),
        **{f"version of {name}": metadata.version(name) for name in packages},
    }


def require_equal_start(facts: Mapping[str, Any]) -> None:
    """Refuses to train where the ranks were started with other facts, by name; nested ones are named a.b.c.

    To be called before anything depends on them, process groups included. StartError on all ranks. Collective over all
    ranks of the launch: 64 bytes from each, where they agree.
    """
    own = flat(facts)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(gather_from_all(digest))) == 1:
        return
    hosts, found = zip(*gather_from_all((socket.gethostname(), own)), strict=True)
    names = list(dict.fromkeys(name for facts in found for name in facts))
    different = [name for name in names if len({facts.get(name) for facts in found}) > 1]
    first = different[0]
    values: dict[str | None, list[int]] = {}
    for rank, facts in enumerate(found):
        values.setdefault(facts.get(first), []).append(rank)
    said = ", ".join(f"{value} on {_named(ranks, hosts)}" for value, ranks in values.items())
    also = f"; also {_some(different[1:])}" if len(different) > 1 else ""
    raise StartError(
        f"the ranks were started differently: {first} is {said}{also}; start all machines with the same files, "
        "arguments and versions"
    )


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts by dotted name; values as JSON."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": json.dumps(value, default=str)}
    return found


def update_crc32(batches: Sequence[Batch]) -> int:
    """crc32 over all tensors of an update's micro-batches, which lie on the CPU."""
    crc32 = 0
    for batch in batches:
        for value in batch.tensors():
            crc32 = zlib.crc32(value.numpy().data, crc32)
    return crc32


def weight_sums(module: nn.Module, zero_stage: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sums of the bits of what this rank computes with, by logical name: of what all data-parallel ranks hold, and of
    experts. A single flipped bit changes its sum. At ZeRO-3 no weight is held twice."""
    held: list[tuple[ShardedTensorSpec, torch.Tensor]] = list(saved_buffers(module))
    if zero_stage < 3:
        held += [view for parameter in module.parameters() for view in views_of(parameter)]
    sums = torch.stack([_bit_sum(tensor) for _, tensor in held]).tolist() if held else []
    dense: dict[str, int] = {}
    experts: dict[str, int] = {}
    for (shard, _), total in zip(held, sums, strict=True):
        (experts if "ep" in shard.axes else dense)[shard.name] = total
    return dense, experts


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)


def require_agreement(batches: Sequence[Batch], module: nn.Module, zero_stage: int, mesh: Mesh) -> None:
    """Refuses to train on where ranks differ: the batches within a model-parallel group (tp, cp, pp), which each rank
    makes by itself, or the weights over the data-parallel ranks (dp, cp), which each rank steps by itself.

    DisagreementError on all ranks. Collective over the world: 48 bytes from each rank, where they agree.
    """
    if mesh["world"].size == 1:
        return
    weights = weight_sums(module, zero_stage)
    crc32s = [zlib.crc32(json.dumps(sums).encode()) for sums in weights]
    groups = [mesh["dp"].index, mesh["dp_cp"].ranks[0], mesh["expert_dp"].ranks[0]]
    own = torch.tensor([groups, [update_crc32(batches), *crc32s]], device=mesh.device)
    table = all_gather(own, mesh, "world").cpu()
    for i, what in enumerate(("batch of this step", "weights", "weights of experts")):
        odd = odd_ranks(table[:, 0, i].tolist(), table[:, 1, i].tolist())
        if odd:
            _refuse(what, *odd, weights[max(i - 1, 0)] if i else {}, mesh)


def odd_ranks(groups: Sequence[int], values: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """groups, values: of every rank. In the first group whose values differ: the ranks that have another one than most
    ranks of the group, and those most ranks; in doubt the lower ranks are right. None where all groups agree."""
    for group in sorted(set(groups)):
        ranks = [rank for rank, found in enumerate(groups) if found == group]
        counted = Counter(values[rank] for rank in ranks).most_common()
        if len(counted) > 1:
            return [r for r in ranks if values[r] != counted[0][0]], [r for r in ranks if values[r] == counted[0][0]]
    return None


def _refuse(what: str, odd: list[int], others: list[int], sums: Mapping[str, int], mesh: Mesh) -> None:
    hosts, found = zip(*all_gather_objects((socket.gethostname(), sums), mesh, "world"), strict=True)
    tensors = [name for name, total in found[odd[0]].items() if total != found[others[0]].get(name)]
    where = f" in {_some(tensors)}" if tensors else ""
    remedy = (
        "its memory or processor may be faulty: go on from the newest checkpoint without that machine"
        if tensors
        else "make sure that all machines see the same neomoba.data.train"
    )
    raise DisagreementError(
        f"{_named(odd, hosts)}: not the {what} of {_named(others, hosts)}, which must be the same{where}; {remedy}"
    )


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """ "rank 1 (n1), rank 4 (n2)"."""
    return _some([f"rank {rank} ({hosts[rank]})" for rank in ranks])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
