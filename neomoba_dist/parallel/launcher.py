"""What the launcher says: rank, world size, meeting place and device of this process, and the meeting itself.

The only place below launch/ that reads environment variables. deepspeed, torchrun, srun and mpirun each set their own;
half-set ones, and those left over from another launcher, are refused in one line.
"""

import os
import socket
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from neomoba_dist.config import ConfigError
from neomoba_dist.parallel.ledger import CommunicationError


def _first_host(node_list: str) -> str:
    """First host of a SLURM node list: "n[01-04,07],m1" -> "n01"."""
    head, bracket, tail = node_list.partition("[")
    if bracket and "," not in head:
        return head + tail.split("]")[0].split(",")[0].split("-")[0]
    return node_list.split(",")[0]


# Launcher -> its variables for rank, world size, rank on the machine and ranks on the machine. An empty name: may be
# missing. The first one that set all decides.
_LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "WORLD_SIZE", "", ""),
    "Open MPI's mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH's mpirun": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "",
    ),  # last: mpirun's ranks in a batch script have its own
}


def _whole_number(found: Mapping[str, str], name: str) -> int:
    """The value of a launcher's variable. ConfigError if it is no whole number."""
    if not found[name].strip().isdecimal():
        raise ConfigError(f"{name} is {found[name]!r} in the environment, not a number of ranks; unset {name}")
    return int(found[name])


def _launched_by(found: Mapping[str, str]) -> str | None:
    """The launcher whose variables describe this process; None for a world of one.

    Raises ConfigError where a launcher left only some of its variables, as in a shell inside an allocation or after an
    exported environment: such a process would wait for ranks that nobody has started, or train alone beside others.
    """
    half_set = None
    for launcher, (rank, size, *local) in _LAUNCHERS.items():
        # SLURM's allocation has a size without a rank (salloc's shell); the others' worlds of one need nothing more
        given = [name for name in (rank, size) if name in found and not (launcher == "srun" and rank not in found)]
        one = _whole_number(found, size) == 1 if size in found else launcher == "srun" and found.get(rank) == "0"
        if not given or (one and not (rank == "RANK" and rank in found)):
            continue
        needed = [rank, size, *(name for name in local if name)]
        if launcher == "srun":  # a batch script's own shell has the other variables, too, as if it were rank 0
            needed.append("SLURM_STEP_ID")
            needed += [] if found.get("MASTER_ADDR") else ["SLURM_JOB_NODELIST"]
        remedy = f"start with {launcher} itself, or unset {given[0]} to run one process"
        if missing := [name for name in needed if not found.get(name)]:
            half_set = half_set or (
                f"{given[0]} is set in the environment, but not {', '.join(missing)}: only a part of what {launcher} "
                f"sets, as in a shell inside an allocation or after an export; {remedy}"
            )
        elif _whole_number(found, rank) >= _whole_number(found, size):
            raise ConfigError(f"{rank} is {found[rank]} and {size} {found[size]}, but ranks count from 0; {remedy}")
        else:
            return launcher
    if half_set:
        raise ConfigError(half_set)
    return None


def _refuse_leftovers(found: Mapping[str, str]) -> None:
    """ConfigError where RANK and WORLD_SIZE are left over from elsewhere beside the ranks of srun or mpirun.

    All processes of such a launch would take the same rank. torchrun and deepspeed may themselves run under srun, one
    per host, and contradict it rightly: they leave a variable of their own. But all of them must make one world.
    """
    if "RANK" not in found:
        return
    if agents := found.get("GROUP_WORLD_SIZE") or found.get("CROSS_SIZE"):
        started = found.get("SLURM_STEP_NUM_TASKS", "1")
        if started not in ("1", agents):
            raise ConfigError(
                f"srun started {started} of torchrun or deepspeed, but this one knows of {agents}: each would train "
                "alone; give all of them the same meeting place and number of hosts (torchrun --nnodes "
                "--rdzv-endpoint, deepspeed --hostfile --node_rank --no_ssh)"
            )
        return
    for launcher, (rank, size, *_) in list(_LAUNCHERS.items())[1:]:
        if not (found.get(rank) and found.get(size)) or _whole_number(found, size) == 1:
            continue
        if (found["RANK"], found.get("WORLD_SIZE")) != (found[rank], found[size]):
            raise ConfigError(
                f"RANK {found['RANK']} of WORLD_SIZE {found.get('WORLD_SIZE')} is left in the environment, but "
                f"{launcher} started this process as {rank} {found[rank]} of {size} {found[size]}; unset RANK and "
                "WORLD_SIZE"
            )
        return


# What other MPI flavours set; each of their ranks would otherwise train alone, as a world of one.
_UNKNOWN_RANKS = ("PMIX_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "FLUX_TASK_RANK")


def map_launcher_environment(environment: MutableMapping[str, str] = os.environ) -> tuple[int, int]:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT; returns (rank, world size).

    deepspeed and torchrun set them; SLURM's (srun), Open MPI's and MPICH's (mpirun) own variables are translated; a
    plain `python` is a world of one. Raises ConfigError where a launcher's variables are half set or are no numbers.
    """
    found = environment
    launcher = _launched_by(found)
    if launcher == "deepspeed or torchrun":
        _refuse_leftovers(found)
    if launcher is None:
        alone = any(found.get(size) == "1" for _, size, *_ in _LAUNCHERS.values())
        for name in _UNKNOWN_RANKS:
            if name in found and not alone:
                raise ConfigError(
                    f"{name} is {found[name]}, but no world size is known: started by an MPI that is not supported; "
                    "use srun, torchrun, deepspeed, or the mpirun of Open MPI or MPICH"
                )
    mapped: dict[str, str] = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    if launcher is not None:
        names = _LAUNCHERS[launcher]
        mapped = {key: found[name] for key, name in zip(mapped, names, strict=True) if name}
    if launcher == "srun":
        per_node = found.get("SLURM_NTASKS_PER_NODE") or found.get("SLURM_TASKS_PER_NODE") or found["SLURM_NTASKS"]
        mapped |= {
            "LOCAL_SIZE": per_node.split("(")[0].split(",")[0],
            "MASTER_ADDR": found.get("MASTER_ADDR") or _first_host(found["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": found.get("MASTER_PORT") or str(15000 + int(found.get("SLURM_JOB_ID", "0")) % 17000),
        }
    elif launcher is not None and "RANK" not in found:
        # mpirun in a batch script spans the job's hosts and starts rank 0 on the first one
        first = _first_host(found["SLURM_JOB_NODELIST"]) if found.get("SLURM_JOB_NODELIST") else "127.0.0.1"
        mapped |= {
            "MASTER_ADDR": found.get("MASTER_ADDR", first),
            "MASTER_PORT": found.get("MASTER_PORT", "29500"),
        }
    environment.update(mapped)
    # DeepSpeed counts CPU "devices" by LOCAL_SIZE, else by forking numactl at every call; torchrun does not set it.
    environment.setdefault("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", "1"))
    environment.setdefault("LOCAL_RANK", "0")
    for name in ("LOCAL_RANK", "LOCAL_SIZE"):
        _whole_number(environment, name)
    # megatron-core overlaps communication with compute only if the GPU takes kernels in the order of their launch
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at every import
    return int(environment["RANK"]), int(environment["WORLD_SIZE"])


def launched_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that srun or an mpirun says it has started this one among; 1 where none says so."""
    for launcher, (rank, size, *_) in list(_LAUNCHERS.items())[1:]:
        if rank in environment and size in environment and (launcher != "srun" or "SLURM_STEP_ID" in environment):
            return _whole_number(environment, size)
    return 1


def local_device(local_rank: int, local_ranks: int, visible: int) -> int:
    """Index of this rank's GPU among the `visible` ones, which are counted from 0 in every process.

    One visible GPU beside other ranks on the machine is its own (srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES set rank
    by rank); that it is not everybody's is checked once the ranks have met. ConfigError if there are too few.
    """
    if visible == 1:
        return 0
    if local_ranks > visible:  # seen by all local ranks alike
        raise ConfigError(
            f"{local_ranks} ranks on a machine with {visible} GPUs; "
            f"start at most that many ranks on it (deepspeed --num_gpus {visible} ...)"
        )
    return local_rank


def refuse_shared_devices(devices: Sequence[tuple[str, str]]) -> None:
    """devices: of every rank its host and the UUID of its GPU. ConfigError if two ranks have the same."""
    first: dict[tuple[str, str], int] = {}
    for rank, device in enumerate(devices):
        if (other := first.setdefault(device, rank)) != rank:
            raise ConfigError(
                f"ranks {other} and {rank} share the GPU {device[1]} of {device[0]}; start at most one rank per GPU or "
                "give each task its own (srun --gpus-per-task=1)"
            )


def initialize_process_group(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group that the launcher described; returns this process's device.

    gloo on a CPU machine; on GPUs gloo for CPU tensors and NCCL for CUDA ones. A world of one needs no launcher: it
    meets itself through a store in memory.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])
        device = torch.device("cuda", local_device(local_rank, local_ranks, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    arguments: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo"}
    if int(os.environ["WORLD_SIZE"]) == 1 and "MASTER_ADDR" not in os.environ:
        arguments.update(store=dist.HashStore(), rank=0, world_size=1)
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(
            f"RANK is {os.environ['RANK']} of WORLD_SIZE {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not "
            "set in the environment; start with deepspeed or torchrun, which set them, or unset RANK and WORLD_SIZE to "
            "run one process"
        )
    try:
        dist.init_process_group(**arguments, timeout=timedelta(minutes=timeout_minutes))
    except dist.DistNetworkError as error:
        raise CommunicationError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} cannot be used ({error}); if another run "
            "holds it, choose another one: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
        ) from error
    if cuda and local_ranks > torch.cuda.device_count():
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        refuse_shared_devices(gather_from_all((socket.gethostname(), uuid)))
    return device


def gather_from_all(value: Any) -> list[Any]:
    """The small picklable `value` of every rank of the launch, in rank order: for what precedes the mesh.

    Raises CommunicationError where a rank ends meanwhile.
    """
    values: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise CommunicationError(f"another rank ended at the start; see its message ({error})") from error
    return values


def join_world() -> None:
    """Meet the other ranks of the launch, if there are any and this process has not met them yet."""
    if joined_world_size() == 1 and map_launcher_environment()[1] > 1:
        initialize_process_group()


def joined_world_size() -> int:
    """Ranks of the process group that this process has joined; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def joined_rank() -> int:
    """This process's rank among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def rendezvous_store(prefix: str) -> Any:
    """A connection of its own to the store where the ranks have met, for keys that begin with `prefix`."""
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]


def leave_process_group(seconds: float = 5.0) -> None:
    """Destroy all process groups, if there are any; what does not come to an end in time is left to the process's."""
    if dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(seconds)
