"""Are all machines sound and as fast as the others? A matrix product on every rank, an all-reduce within every host."""

import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neomoba_dist.parallel.launcher import gather_from_all

REPEATS = 5  # of each measurement; the fastest counts, as other work on a machine only slows it down


@dataclass(frozen=True)
class RankSpeed:
    """What one rank has measured. product: TFLOP/s. exact: whether the product was right to the last bit. reduce: GB/s
    of each rank in an all-reduce within the host, 2 (n - 1) / n times the bytes; None on a rank without a neighbour."""

    host: str
    product: float
    exact: bool
    reduce: float | None


def measure(device: torch.device, size: int, megabytes: int) -> list[RankSpeed]:
    """Speeds of all ranks, in rank order, the same on each. size: of the square matrices, float32 (TF32 on a GPU).

    Collective over all ranks of the launch.
    """
    host = socket.gethostname()
    torch.backends.cuda.matmul.allow_tf32 = True
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-3, 4, (size, size), generator=generator).float().to(device) for _ in range(2))
    seconds = _fastest(lambda: a @ b, device)
    # small whole numbers: every format that a product may take on the way holds them, and their sums, exactly
    exact = bool(torch.equal((a @ b).double().sum(1), a.double() @ b.double().sum(1)))
    hosts = gather_from_all(host)
    reduce = None
    for name in dict.fromkeys(hosts):
        ranks = [rank for rank, found in enumerate(hosts) if found == name]
        group = dist.new_group(ranks) if len(ranks) > 1 else None  # all ranks make all groups
        if group is not None and name == host:
            values = torch.ones(megabytes * 250_000, device=device)
            dist.all_reduce(values, group=group)  # connects
            spent = _fastest(lambda values=values, group=group: dist.all_reduce(values, group=group), device)  # type: ignore[misc]
            reduce = 2 * (len(ranks) - 1) / len(ranks) * megabytes / 1e3 / spent
    return gather_from_all(RankSpeed(host, 2 * size**3 / seconds / 1e12, exact, reduce))


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    found = []
    for _ in range(REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def problems(speeds: list[RankSpeed], tolerance: float) -> dict[str, list[str]]:
    """What is wrong with each host, in words; sound hosts are left out. tolerance: how many times slower than the
    median host one may be; its slowest rank counts."""
    found: dict[str, list[str]] = {}
    for rank, speed in enumerate(speeds):
        if not speed.exact:
            found.setdefault(speed.host, []).append(f"rank {rank} computes a wrong matrix product")
    for name, unit in (("product", "TFLOP/s"), ("reduce", "GB/s")):
        hosts = _slowest_ranks(speeds, lambda speed, name=name: getattr(speed, name))  # type: ignore[misc]
        median = statistics.median(hosts.values()) if hosts else 0.0
        for host, value in hosts.items():
            if value * tolerance < median:
                found.setdefault(host, []).append(f"{name} {value:.3g} {unit}, the median host {median:.3g}")
    return found


def _slowest_ranks(speeds: list[RankSpeed], value: Callable[[RankSpeed], float | None]) -> Mapping[str, float]:
    hosts: dict[str, float] = {}
    for speed in speeds:
        if (found := value(speed)) is not None:
            hosts[speed.host] = min(found, hosts.get(speed.host, found))
    return hosts
