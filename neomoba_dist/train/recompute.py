"""`neomoba.phase.recompute: auto`: the least recomputation whose planned memory fits the smallest device of the job."""

import os

import torch

from neomoba_dist.config import Config
from neomoba_dist.model.optional import log_choice
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.planner import RESERVE, Planner
from neomoba_dist.train.step_plan import Machine


def choose_recompute(config: Config, mesh: Mesh) -> Config:
    """The configuration without "auto", the same on every rank. Collective over the world."""
    if config.phase.recompute != "auto":
        return config
    memory = torch.tensor(device_memory(mesh), device=mesh.device)
    budget = int(all_reduce(memory, mesh, "world", op="min")) * (1 - RESERVE)
    planner = Planner(mesh["world"].size, Machine(), mesh.device.type)
    chosen = planner.with_recompute(config, budget)
    planned = planner.layout(chosen).memory.total
    log_choice(
        f"recomputation: {planned / 2**30:.1f} GiB planned for at most {budget / 2**30:.1f}", chosen.phase.recompute
    )
    return chosen


def device_memory(mesh: Mesh) -> int:
    """Bytes of this rank's GPU, or its share of the host's, which all ranks are taken to be on."""
    if mesh.device.type == "cuda":
        return torch.cuda.get_device_properties(mesh.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // mesh["world"].size
