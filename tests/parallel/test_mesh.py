"""The launcher's environment, the rank map, the groups of all axes, and what collectives say when they fail."""

import multiprocessing
import os
import time
import tracemalloc
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from evals.bench._fake_world import join_fake_world
from neomoba_dist.config import ConfigError, ParallelConfig
from neomoba_dist.parallel.comm import (
    CommunicationError,
    agree,
    all_gather_objects,
    all_reduce,
    broadcast,
    on_first_rank,
)
from neomoba_dist.parallel.launcher import (
    initialize_process_group,
    launched_size,
    local_device,
    map_launcher_environment,
    refuse_shared_devices,
)
from neomoba_dist.parallel.mesh import Mesh, rank_map
from tests.ranks import RankError, run_ranks

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_TASKS_PER_NODE": "4(x4)",
    "SLURM_JOB_NODELIST": "gpu[07-09,12],login1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
            {"RANK": "3", "LOCAL_SIZE": "4"},
        ),
        (SLURM, {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "gpu07"}),
        ({**SLURM, "SLURM_NTASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}),  # sbatch's own shell, no srun
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        ),
        (
            {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        ),
    ],
    ids=["python", "torchrun", "slurm", "sbatch", "openmpi", "mpich"],
)
def test_environment(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    rank, world = map_launcher_environment(environment)
    assert {key: environment[key] for key in expected} == expected
    assert (rank, world) == (int(environment["RANK"]), int(environment["WORLD_SIZE"]))


OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        *[({k: v for k, v in whole.items() if k != name}, name)
          for whole in (OPENMPI, MPICH, TORCHRUN) for name in whole],
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "SLURM_LOCALID, SLURM_STEP_ID, SLURM_JOB_NODELIST"),
        ({**SLURM, "SLURM_LOCALID": ""}, "SLURM_LOCALID"),
        ({"SLURM_PROCID": "3"}, "SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_ID, SLURM_JOB_NODELIST"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, "SLURM_STEP_ID"),  # python in a batch script
    ],
)  # fmt: skip
def test_half_set_variables_of_a_launcher_are_one_line(given: dict[str, str], missing: str) -> None:
    environment = dict(given)
    message = (
        rf"is set in the environment, but not {missing}: .*; start with .* itself, or unset \w+ to run one process$"
    )
    with pytest.raises(ConfigError, match=message):
        map_launcher_environment(environment)
    assert environment == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2, but ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**SLURM, "SLURM_NTASKS": "16,4"}, "SLURM_NTASKS is '16,4'"),
    ],
)
def test_variables_that_are_no_ranks_are_one_line(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_launcher_environment(dict(given))


@pytest.mark.parametrize(
    ("given", "rank", "world"),
    [
        ({**SLURM, "WORLD_SIZE": "16"}, 5, 16),  # a batch script's own export beside srun's variables
        ({**OPENMPI, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 2, 4),
        ({**OPENMPI, **SLURM, "SLURM_PROCID": "0"}, 2, 4),  # mpirun in a batch script, whose rank is 0 for all of them
        ({**MPICH, **SLURM, "SLURM_PROCID": "0"}, 3, 4),
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "16"}, 5, 16),  # srun --mpi=pmi2
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n1"}, 0, 1),  # salloc's shell
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, 0, 1),
        ({"WORLD_SIZE": "1"}, 0, 1),
    ],
)
def test_a_whole_set_beside_half_of_another_decides(given: dict[str, str], rank: int, world: int) -> None:
    assert map_launcher_environment(dict(given)) == (rank, world)


LEFT = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**LEFT, **SLURM}, "srun started this process as SLURM_PROCID 5 of SLURM_NTASKS 16"),
        ({**LEFT, **OPENMPI}, "Open MPI's mpirun started this process as OMPI_COMM_WORLD_RANK 2"),
        ({**LEFT, **MPICH}, "MPICH's mpirun started this process as PMI_RANK 3"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is 1, but no world size is known"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is 0, but no world size is known"),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 of torchrun or deepspeed"),
        ({**TORCHRUN, "CROSS_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, "but this one knows of 1: each would train"),
    ],
)
def test_variables_of_another_launcher_are_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_launcher_environment(dict(given))


@pytest.mark.parametrize("own", ["GROUP_WORLD_SIZE", "CROSS_SIZE"])
def test_torchrun_and_deepspeed_run_under_srun(own: str) -> None:
    assert map_launcher_environment({**SLURM, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", own: "2"}) == (3, 8)


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, 1), (OPENMPI, 4), (MPICH, 4), (SLURM, 16), ({**SLURM, **OPENMPI}, 4), ({"SLURM_NTASKS": "8"}, 1)],
)
def test_launched_size(given: dict[str, str], size: int) -> None:
    assert launched_size(given) == size


def test_one_process_under_any_mpi_is_a_world_of_one() -> None:
    for size in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"):
        assert map_launcher_environment({"PMIX_RANK": "0", size: "1"}) == (0, 1)


def test_mpirun_in_a_batch_script_meets_on_its_first_host() -> None:
    environment = {**OPENMPI, **SLURM, "SLURM_PROCID": "0"}
    map_launcher_environment(environment)
    assert environment["MASTER_ADDR"] == "gpu07"


def test_devices() -> None:
    assert [local_device(rank, 4, 8) for rank in range(4)] == [0, 1, 2, 3]
    assert [local_device(rank, 4, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match="4 ranks on a machine with 2 GPUs"):
        local_device(0, 4, 2)
    refuse_shared_devices([("n1", "a"), ("n1", "b"), ("n2", "a")])
    with pytest.raises(ConfigError, match="ranks 1 and 2 share the GPU b of n1"):
        refuse_shared_devices([("n1", "a"), ("n1", "b"), ("n1", "b")])


def test_a_world_without_a_meeting_place_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="RANK is 3 of WORLD_SIZE 8, but MASTER_ADDR and MASTER_PORT not set"):
        initialize_process_group()


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[3-7]", "n3"), ("n[03,05]", "n03"), ("x,n[1-2]", "x")]
)
def test_first_slurm_host(nodes: str, first: str) -> None:
    environment = {**SLURM, "SLURM_JOB_NODELIST": nodes}
    map_launcher_environment(environment)
    assert environment["MASTER_ADDR"] == first


def axis_ranks(parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    mesh = Mesh.build(parallel)
    for axis in mesh.axes:
        total = all_reduce(torch.tensor([float(mesh.rank)]), mesh, axis)
        assert float(total) == sum(mesh[axis].ranks)
        assert mesh[axis].ranks[mesh[axis].index] == mesh.rank
        source = torch.tensor([mesh.rank])
        assert int(broadcast(source, mesh, axis, mesh[axis].size - 1)) == mesh[axis].ranks[-1]
        assert all_gather_objects(mesh.rank, mesh, axis) == list(mesh[axis].ranks)
    assert mesh.ledger.entries[("world", "all_reduce")].bytes == 4
    return {axis: mesh[axis].ranks for axis in mesh.axes}


def test_groups_follow_the_rank_map() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    results = run_ranks(8, axis_ranks, parallel)
    table = {}
    for line in rank_map(parallel, 8).splitlines()[2:]:
        rank, pp, dp, cp, tp = map(int, line.split())
        table[rank] = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    for rank, axes in enumerate(results):
        for axis in ("tp", "pp", "dp", "cp"):
            along = [r for r, place in table.items() if all(place[a] == table[rank][a] for a in place if a != axis)]
            assert axes[axis] == tuple(along), (rank, axis)
        assert axes["dp_cp"] == axes["dp"]
        assert axes["world"] == tuple(range(8))


@pytest.mark.parametrize(
    ("tp", "cp", "ep", "pp", "dp"), [(2, 2, 4, 2, 6), (1, 4, 2, 3, 2), (4, 1, 3, 1, 9), (1, 1, 1, 1, 5)]
)
def test_axes_are_those_of_megatron(tp: int, cp: int, ep: int, pp: int, dp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        pipeline_model_parallel_size=pp,
    )
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    experts = RankGenerator(tp=tp, ep=ep, dp=dp * cp // ep, pp=pp, cp=1, order=order)
    expected = {axis: dense.get_ranks(axis) for axis in ("tp", "cp", "pp", "dp")}
    expected |= {"dp_cp": dense.get_ranks("dp-cp"), "model": dense.get_ranks("tp-pp")}
    expected |= {"ep": experts.get_ranks("ep"), "expert_dp": experts.get_ranks("dp")}
    world = tp * cp * pp * dp
    meshes = [Mesh.place(parallel, world, rank, num_key_value_heads=2 * tp) for rank in range(world)]
    for axis, groups in expected.items():
        assert sorted({mesh[axis].ranks for mesh in meshes}) == sorted(map(tuple, groups)), axis
        assert all(mesh[axis].ranks[mesh[axis].index] == mesh.rank for mesh in meshes)
    heads = min(2, cp)
    assert {mesh["cp_heads"].size for mesh in meshes} == {heads}
    assert {mesh["cp_tokens"].size for mesh in meshes} == {cp // heads}


def rank_of_many(rank: int, world_size: int, groups: int) -> None:
    code = 1
    try:
        join_fake_world(rank, world_size)
        parallel = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4)
        Mesh.place(parallel, world_size, rank)  # the first call loads what torch loads late
        tracemalloc.start()
        mesh = Mesh.build(parallel)
        assert mesh["dp_cp"].size == world_size // 32
        assert mesh.num_groups == groups == len(dist.distributed_c10d._world.pg_map)
        assert tracemalloc.get_traced_memory()[1] < 200 * world_size
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("world_size", [1024, 4096])
def test_a_rank_of_many_makes_its_own_groups_only(world_size: int) -> None:
    """The default one, tp, dp, pp, model, and one for all axes of size 1; lists no longer than the ranks."""
    arguments = (world_size // 2 + 1, world_size, 6)
    process = multiprocessing.get_context("fork").Process(target=rank_of_many, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def decide() -> tuple[bool, bool, str]:
    mesh = Mesh.build(ParallelConfig())

    def fail() -> None:
        raise ValueError("the disk is full")

    try:
        on_first_rank(mesh, fail)
    except (ValueError, CommunicationError) as error:
        message = str(error)
    return agree(True, mesh), agree(mesh.rank == 0, mesh), message


def test_one_failure_is_everybodys() -> None:
    assert run_ranks(2, decide) == [
        (True, False, "the disk is full"),
        (True, False, "rank 1: rank 0 failed; see its message"),
    ]


def one_rank_stays_away() -> str:
    mesh = Mesh.build(ParallelConfig())
    short = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    mesh = replace(mesh, axes={**mesh.axes, "dp": replace(mesh["dp"], group=short)})
    if mesh.rank == 1:
        time.sleep(2.0)
        return ""
    try:
        all_reduce(torch.zeros(3), mesh, "dp")
    except CommunicationError as error:
        return str(error)
    return "no error"


def test_a_failed_collective_is_named() -> None:
    message, _ = run_ranks(2, one_rank_stays_away, timeout=30)
    assert message.startswith("rank 0: all_reduce over dp (ranks [0, 1], 12 bytes) failed: ")


def test_a_hung_rank_shows_its_stack() -> None:
    with pytest.raises(RankError, match=r"(?s)hung ranks: \[0, 1\].*in time_sleeper"):
        run_ranks(2, time_sleeper, timeout=1)


def time_sleeper() -> None:
    time.sleep(60)
