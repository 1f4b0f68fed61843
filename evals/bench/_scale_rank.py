"""One rank of `python -m evals bench scale`: the stages of a start, one after the other, in a world without others.

    python -m evals.bench._scale_rank CONFIG RANK WORLD_SIZE CORPUS CACHE SCRATCH

Prints a JSON line for each stage: processor seconds, wall seconds, and memory in bytes: held before, the most during
it, held after.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.bench._fake_world import join_fake_world
from evals.bench._memory import forget_peak, resident_bytes

LARGE = 4096  # ranks of the world whose first batch a rank alone makes


def stage(name: str, work: Callable[[], Any], **facts: int) -> Any:
    """Runs `work` and reports on it; returns what it returns."""
    forget_peak()
    before, cpu, wall = resident_bytes("VmRSS"), time.process_time(), time.perf_counter()
    result = work()
    found = {"stage": name, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "before": before}
    found |= {"peak": resident_bytes("VmHWM"), "after": resident_bytes("VmRSS"), **facts}
    print(json.dumps(found), flush=True)
    return result


def data_stages(config: Any, mesh: Any, cache: Path, scratch: Path) -> None:
    """Corpus, plan and first batch, each with this rank's share of what all do together.

    Other ranks are taken to find what this one finds. A rank alone leaves the plan in the cache; others find it there
    and make their share a second time.
    """
    from neomoba_dist.data.check import check_corpora
    from neomoba_dist.data.job import Job
    from neomoba_dist.data.rows import make_planner
    from neomoba_dist.data.stream import make_packing
    from neomoba_dist.train.assemble import build_stream, open_corpora

    size = mesh["world"].size
    job = Job(mesh.rank, size, lambda value: [value] * size)

    def open_and_check() -> Any:
        corpora = open_corpora(config)
        check_corpora([source.corpus for source in corpora.train], scratch, job)
        return corpora

    corpora = stage("corpus", open_and_check)
    (source,) = corpora.train

    def share_of_plan() -> None:
        planner = make_planner(source, make_packing(config.data, config.phase.sequence_length))
        folder = planner.folder(cache if size == 1 else scratch)
        for part in range(mesh.rank, len(planner.parts), size):
            planner.save(folder, part)
        if size == 1:
            planner.finish(folder)

    stage("plan", share_of_plan)

    def first_batch() -> None:
        world = size if size > 1 else LARGE
        next(iter(build_stream(config, config.plan(world), corpora.train, mesh["dp"].index)))

    stage("first batch", first_batch)


def model_stages(config: Any, plan: Any, mesh: Any, scratch: Path) -> None:
    """Weights, optimizer, and this rank's files of a checkpoint."""
    import torch

    from neomoba_dist.checkpoint.layout import KINDS
    from neomoba_dist.checkpoint.write import write_fragments
    from neomoba_dist.train.engines import FlatEngine, PipelineParallelEngine

    kind: Any = PipelineParallelEngine if mesh["pp"].size > 1 else FlatEngine

    class Measured(kind):
        def _build_module(self) -> Any:
            return stage("weights", lambda: super(Measured, self)._build_module())

    # under ZeRO-3 the weights come with DeepSpeed's partitions, in this stage
    engine = stage("engine", lambda: Measured(config, plan, mesh))
    held = sum(fragment.numel for fragment in engine.fragments())

    def save() -> None:
        folder = scratch / "step"
        folder.mkdir()
        with torch.no_grad():
            write_fragments(folder, mesh.rank, list(engine.local_state()), KINDS)

    stage("save", save, bytes=12 * held)


def main(words: list[str]) -> None:
    """All stages; those of the data alone on a world of one."""
    path, rank, world_size = words[0], int(words[1]), int(words[2])
    corpus, cache, scratch = (Path(word) for word in words[3:])

    def configure() -> Any:
        from neomoba_dist.config import load_config

        paths = (f"neomoba.data.train={corpus}", f"neomoba.data.cache={cache}", "neomoba.data.prefetch=0")
        config = load_config(path, paths)
        return config, config.plan(world_size)

    config, plan = stage("config", configure)

    def imports() -> None:
        import numpy as np
        import torch

        import neomoba_dist.train.engines  # noqa: F401
        from neomoba_dist.data.pack import Packing, plan_rows

        torch.set_num_threads(1)
        plan_rows(
            np.zeros(1, np.int64), np.ones(1, np.int64), Packing(length=8, max_documents=1)
        )  # loads compiled code

    stage("imports", imports)

    def meet() -> Any:
        from neomoba_dist.parallel.mesh import Mesh

        join_fake_world(rank, world_size)
        return Mesh.build(config.parallel, num_key_value_heads=config.model.num_key_value_heads)

    mesh = stage("mesh", meet)
    data_stages(config, mesh, cache, scratch)
    if world_size > 1:
        model_stages(config, plan, mesh, scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # no others to take leave of
