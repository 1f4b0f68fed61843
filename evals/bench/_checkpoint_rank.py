"""One rank of `python -m evals bench checkpoint`: its share of a state, saved and loaded in several ways."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from evals.bench._memory import forget_peak, resident_bytes
from neomoba_dist.checkpoint.layout import KINDS, step_folder
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.resume import Candidates, read_together
from neomoba_dist.checkpoint.save import CheckpointSaver
from neomoba_dist.checkpoint.state import StateFragment
from neomoba_dist.config import Config, parse_config
from neomoba_dist.config.schema import CheckpointConfig
from neomoba_dist.parallel.comm import all_gather_objects, barrier, num_bytes
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.checkpoint_plan import stage_module, state_of_rank

MIB = 2**20
PRODUCTS = 150


def model_config(layers: int) -> Config:
    """Blocks of 3.1M parameters, 512 wide."""
    model = {
        "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 1365,
    }  # fmt: skip
    phase = {"name": "x", "steps": 1, "sequence_length": 512, "tokens_per_update": 512, "learning_rate": 1e-3}
    return parse_config(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "neomoba": {"model": model, "data": {"train": "-"}, "phase": phase},
        }
    )


class Share:
    """What a rank saves: as ZeRO-1 has it, a flat partition for the weights and for each moment."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        module = stage_module(config, mesh["tp"], mesh["pp"], mesh["ep"])
        planned = list(state_of_rank(config, module, mesh))
        size = sum(next(iter(fragment.values.values())).numel() for fragment in planned)
        self.partitions = {kind: torch.rand(size) for kind in KINDS}
        self.fragments, start = [], 0
        for fragment in planned:
            numel = fragment.values[KINDS[0]].numel()
            held = {kind: flat.narrow(0, start, numel) for kind, flat in self.partitions.items()}
            self.fragments.append(fragment._replace(values=held))
            start += numel

    @property
    def bytes(self) -> int:
        return sum(map(num_bytes, self.partitions.values()))

    def local_state(self) -> Iterator[StateFragment]:
        yield from self.fragments


def main(rank: int, world: int, folder: str, layers: int, repetitions: int) -> None:
    """Rank 0 leaves `folder`/result.json: bytes, seconds of the slowest rank, memory of the largest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    config = model_config(layers)
    mesh = Mesh.build(config.parallel)
    share = Share(config, mesh)
    bench = Bench(share, Path(folder))
    turns: list[dict[str, float]] = [bench.turn() for _ in range(repetitions)]
    peak = {name: bench.peak(name) for name in ("save", "async")}
    found = all_gather_objects((turns, peak, share.bytes), mesh, "world")
    if rank == 0:
        files = [file for file in bench.checkpoint.rglob("*") if file.is_file()]
        result = {
            "ranks": world,
            "parameters": sum(shares for *_, shares in found) // 12,
            "bytes": sum(file.stat().st_size for file in files),
            "share": max(shares for *_, shares in found),
            "peak": {name: max(peaks[name] for _, peaks, _ in found) for name in peak},
            "seconds": {
                name: min(max(times[turn][name] for times, *_ in found) for turn in range(repetitions))
                for name in turns[0]
            },
        }
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    barrier(mesh)
    dist.destroy_process_group()


class Bench:
    """The rivals, each as a call on all ranks."""

    def __init__(self, share: Share, folder: Path) -> None:
        self.share, self.mesh, self.folder = share, share.mesh, folder
        self.checkpoint = step_folder(folder / "run", 1)
        self.waiting = CheckpointSaver(folder / "run", share, CheckpointConfig(async_save=False))
        self.copying = CheckpointSaver(folder / "copy", share, CheckpointConfig())
        self.buffer = torch.ones(share.bytes + MIB, dtype=torch.uint8)

    def turn(self) -> dict[str, float]:
        """Seconds of each rival once, until all ranks are done; only the last checkpoint is left."""
        self._remove("run")
        found = {"save": self._seconds(lambda: self.waiting.save(1, {"world_size": 1}))}
        found["torch.save"] = self._seconds(self._torch_save)
        (self.folder / f"{self.mesh.rank}.pt").unlink()
        found["step"] = self._seconds(self._step)
        found |= self._save_beside_a_step()
        for name, work in (("read", self._read), ("load", self._load)):
            self._forget()
            found[name] = self._seconds(work)
        return found

    def _save_beside_a_step(self) -> dict[str, float]:
        """Training stands still for the call and, before the optimizer's step, for the rest of the copy."""
        still = [0.0]

        def work() -> None:
            started = time.perf_counter()
            self.copying.save(1, {})
            still[0] += time.perf_counter() - started
            self._step()
            started = time.perf_counter()
            self.copying.settle()
            still[0] += time.perf_counter() - started

        found = {"save and step": self._seconds(work), "pause": still[0]}
        self.copying.finish()
        self._remove("copy")
        return found

    def _seconds(self, work: Callable[[], None]) -> float:
        barrier(self.mesh)
        started = time.perf_counter()
        work()
        barrier(self.mesh)
        return time.perf_counter() - started

    def _step(self) -> None:
        """Stands for forward and backward: some tenths of a second of matrix products."""
        matrix = torch.full((512, 512), 1e-3)
        for _ in range(PRODUCTS):
            matrix @ matrix

    def _remove(self, name: str) -> None:
        barrier(self.mesh)
        if self.mesh.rank == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        barrier(self.mesh)

    def peak(self, name: str) -> int:
        """Most memory of this process during a save, above what it held before; "async": with a new copy."""
        saver = CheckpointSaver(self.folder / "peak", self.share, CheckpointConfig(async_save=name == "async"))
        self.buffer, self.copying = torch.empty(0), saver
        forget_peak()
        before = resident_bytes("VmRSS")
        saver.save(1, {})
        saver.finish()
        return resident_bytes("VmHWM") - before

    def _torch_save(self) -> None:
        with open(self.folder / f"{self.mesh.rank}.pt", "wb") as file:
            torch.save(self.share.partitions, file)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        memory, start = memoryview(self.buffer.numpy().data), 0
        for path in self._own_files():
            with open(path, "rb", buffering=0) as file:
                while read := file.readinto(memory[start : start + (1 << 30)]):
                    start += read

    def _load(self) -> None:
        def load(reader: CheckpointReader) -> None:
            checksums = reader.checksums(KINDS, (self.mesh.rank, self.mesh["world"].size))
            read_together(self.mesh, lambda: reader.fill(self.share.fragments, checksums))

        Candidates(self.folder / "run", "must", self.mesh, print).load(load)

    def _own_files(self) -> list[Path]:
        return sorted(self.checkpoint.glob(f"*-{self.mesh.rank:05d}.safetensors"))

    def _forget(self) -> None:
        for path in self._own_files():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
