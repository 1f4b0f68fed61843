"""Ranks of one model-parallel group hold the same batches: proved by crc32, and agreed on when rows are damaged."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.config import Config, parse_config
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.assemble import build_stream, open_corpora
from neomoba_dist.train.guard import DisagreementError, require_agreement, update_crc32
from tests.ranks import run_ranks
from tests.runs import run_config, shared_corpus

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp2": (2, {}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "cp2_pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def _digests(config: Config, damaged_rank: int | None) -> tuple[int, list[int], str]:
    """(place on the dp axis, crc32 of three updates, what the check said) of one rank."""
    world = torch.distributed.get_world_size()
    mesh = Mesh.build(config.parallel)
    plan = config.plan(world)
    stream = build_stream(config, plan, open_corpora(config).train, mesh["dp"].index, mesh)
    digests, said = [], ""
    for batches, _ in islice(stream, 3):
        if mesh.rank == damaged_rank:
            batches[-1] = replace(batches[-1], labels=batches[-1].labels.roll(1))
        digests.append(update_crc32(batches))
        try:
            require_agreement(batches, torch.nn.Module(), 1, mesh)
        except DisagreementError as error:
            said = str(error)
    return mesh["dp"].index, digests, said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_depends_on_the_data_parallel_rank_only(layout: str) -> None:
    world, axes = LAYOUTS[layout]
    results = run_ranks(world, _digests, run_config(axes), None)
    groups: dict[int, list[list[int]]] = {}
    for index, digests, said in results:
        assert said == ""
        groups.setdefault(index, []).append(digests)
    assert all(digests == group[0] for group in groups.values() for digests in group)
    assert len({tuple(group[0]) for group in groups.values()}) == len(groups)


def test_a_different_batch_stops_all_ranks() -> None:
    results = run_ranks(4, _digests, run_config({"tensor_model_parallel_size": 2}), 3)
    assert all(
        said.startswith("rank 3 (") and ": not the batch of this step of rank 2 (" in said for _, _, said in results
    )


def _skipping(layout: dict[str, int], folders: list[str]) -> tuple[int, list[int], int]:
    """(place on the dp axis, crc32 of each update, rows skipped) where each rank reads from a folder of its own."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tree: dict[str, Any] = run_config(layout).to_dict()
    tree["neomoba"]["data"] |= {"train": folders[rank], "on_corrupt": "skip"}
    config = parse_config(tree)
    mesh = Mesh.build(config.parallel)
    stream = build_stream(config, config.plan(world), open_corpora(config).train, mesh["dp"].index, mesh)
    digests, skipped = [], 0
    for batches, _ in islice(stream, 60):
        require_agreement(batches, torch.nn.Module(), 1, mesh)
        digests.append(update_crc32(batches))
        skipped += stream.skipped_rows
    return mesh["dp"].index, digests, skipped


def test_one_damaged_disk_makes_all_ranks_skip_the_same_rows(tmp_path: Path) -> None:
    intact = shared_corpus()
    damaged = shutil.copytree(intact, tmp_path / "damaged")
    shard = sorted(damaged.glob("*.tar"))[1]
    payload = bytearray(shard.read_bytes())
    payload[5000] ^= 1
    shard.write_bytes(payload)
    folders = [str(intact), str(intact), str(damaged), str(intact)]
    results = run_ranks(4, _skipping, {"tensor_model_parallel_size": 2}, folders)
    assert len({skipped for _, _, skipped in results}) == 1
    assert results[0][2] > 0
    assert results[0][1] == results[1][1]
    assert results[2][1] == results[3][1]
    clean = run_ranks(4, _skipping, {"tensor_model_parallel_size": 2}, [str(intact)] * 4)
    assert clean[0][1] == results[0][1]  # the other data-parallel ranks keep their rows
    assert clean[2][1] != results[2][1]
