"""Out of memory, told in one line: what fills it, and which keys make less of it."""

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neomoba_dist.config import Config, ConfigError
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.checkpoint_plan import stage_module
from neomoba_dist.train.memory_plan import Stage, zero_memory


class OutOfMemoryError(ConfigError):
    """The configuration does not fit; the message is one line."""


@contextmanager
def memory_explained(config: Config, mesh: Mesh) -> Iterator[None]:
    """Turns what torch and its allocators raise inside into an OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parts = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in memory_parts(config, mesh).items())
        raise OutOfMemoryError(
            f"out of memory on rank {mesh.rank} ({socket.gethostname()}) of {_capacity(mesh)}: {parts}; "
            f"{', or '.join(remedies(config, mesh))}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of the host, or of NCCL's buffers."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    )


def memory_parts(config: Config, mesh: Mesh) -> dict[str, int]:
    """Bytes on this rank. The first three follow from layout and ZeRO stage; the last one is the most that was in use
    at a time, of the device or else of the process, without them."""
    module = stage_module(config, mesh["tp"], mesh["pp"], mesh["ep"])
    zero = zero_memory(config, mesh, Stage.of(module, config.phase.optimizer))
    parts = {"weights": zero.weights, "gradients": zero.gradients, "optimizer": zero.optimizer}
    if mesh.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(mesh.device)
    else:
        most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**parts, "activations and the rest so far": max(0, most - sum(parts.values()))}


def _capacity(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        return f"{torch.cuda.get_device_properties(mesh.device).total_memory / 2**30:.0f} GiB"
    return "host memory"


def remedies(config: Config, mesh: Mesh) -> list[str]:
    """At most three keys that make less of it, the cheapest first, with values that differ from those of now."""
    rows, phase, parallel = config.plan(mesh["world"].size).micro_batch_size, config.phase, config.parallel
    found, graphs = [], phase.cuda_graphs
    if graphs:
        found.append('set neomoba.phase.compile to "auto"')
    if rows > 1:
        found.append(f"lower train_micro_batch_size_per_gpu from {rows} to {rows // 2}")
    if phase.recompute != "full":
        found.append(f'set neomoba.phase.recompute to "{"selective" if phase.recompute == "none" else "full"}"')
    most = 1 if mesh["pp"].size > 1 else 2 if graphs or (config.model.moe_layers and mesh["tp"].size > 1) else 3
    if config.zero_stage < most:
        found.append(f"raise zero_optimization.stage from {config.zero_stage} to {config.zero_stage + 1}")
    if not graphs:
        found.append(f"raise neomoba.parallel.context_parallel_size from {parallel.context_parallel_size}")
        found.append(f"raise neomoba.parallel.tensor_model_parallel_size from {parallel.tensor_model_parallel_size}")
    found.append(f"lower neomoba.phase.sequence_length from {phase.sequence_length}")
    return found[:3]
