"""A world of any number of ranks in which this process is the only one: collectives return at once, with any values."""

from __future__ import annotations


def join_fake_world(rank: int, world_size: int) -> None:
    """Become rank `rank` of a default process group of torch's "fake" backend."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from neomoba_dist.parallel.launcher import map_launcher_environment

    map_launcher_environment()  # DeepSpeed asks it for the place on this machine
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
