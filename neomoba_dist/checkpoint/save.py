"""The saves of a run: a thread copies the state to host memory, then writes it, while training goes on.

The copy must be complete before the optimizer next changes the state: `settle`, called right before it does. Until
then a step runs forward and backward, so that as a rule nobody waits.

How the ranks agree, and why they cannot wait for each other for ever:

- Only `save` and `finish`, called by all ranks at the same step, use collectives, each of one number. Threads use none.
- A rank's thread writes this rank's files, then its note (write.py). Rank 0's thread goes on: it waits until all notes
  are there, writes index and manifest, and renames the folder. So a checkpoint is complete as soon as the slowest rank
  has written, whatever the training step does meanwhile, and also if training fails meanwhile.
- A note that never comes: a rank whose thread failed says so at its next step (`failed`, which the trainer agrees on),
  all ranks call `finish`, and there rank 0 gives up. A rank that died ends the training step of the others, whose
  `close` waits for seconds only. `finish` itself first waits for this rank's own files, then agrees on success, and
  only then does rank 0 wait for the notes, which by then are all on disk.
"""

import math
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from neomoba_dist.checkpoint.files import make_empty
from neomoba_dist.checkpoint.host_copy import HostCopy
from neomoba_dist.checkpoint.keep import remove_old
from neomoba_dist.checkpoint.layout import (
    FORMAT,
    KINDS,
    RANKS_PER_FOLDER,
    VERSION,
    AgreedCheckpointError,
    CheckpointError,
    step_folder,
)
from neomoba_dist.checkpoint.state import StateFragment, StateSource
from neomoba_dist.checkpoint.write import commit, note_path, write_fragments
from neomoba_dist.config import Config
from neomoba_dist.config.schema import CheckpointConfig
from neomoba_dist.parallel.comm import agree, all_gather_objects, all_reduce, num_bytes

POLL_SECONDS = 0.02
NOTE_SECONDS = 300.0  # until notes are seen that are known to be written: a network disk may be slow to show them
LAST_NOTE_SECONDS = 15.0  # until they are seen after training has failed: their writers may be gone

_BUSY, _FAILED = 1, 2  # what a rank says of a save that it did not find done


class _Target(NamedTuple):
    """A folder that a save fills, and what of the state goes into it."""

    final: Path
    kinds: tuple[str, ...]

    @property
    def writing(self) -> Path:
        return self.final.with_name(self.final.name + ".writing")


def document_head(config: Config, step: int) -> dict[str, Any]:
    """index.json but for the table of tensors."""
    head = {"format": FORMAT, "version": VERSION, "step": step, "ranks_per_folder": RANKS_PER_FOLDER}
    return head | {"config": config.to_dict()}


@dataclass
class _Job:
    """One save on this rank. `problem`: what failed, set before `written` if it concerns the rank's own files."""

    targets: Sequence[_Target]
    fragments: Sequence[StateFragment]
    document: dict[str, Any]
    trainer: dict[str, Any]
    problem: str | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    deadline: float = math.inf  # of rank 0's wait for the notes, on the monotonic clock
    thread: threading.Thread | None = None

    def busy(self) -> bool:
        """Whether the thread is at work."""
        return self.thread is not None and self.thread.is_alive()

    def join(self, patience: float) -> None:
        """Wait for the thread's end; it waits for notes so many seconds longer at most."""
        self.deadline = time.monotonic() + patience
        assert self.thread is not None
        self.thread.join()


class CheckpointSaver:
    """At most one save is under way. `save` and `finish` are collective over the world.

    output: run folder. source: yields what this rank saves; all ranks' fragments fill every tensor once.
    """

    def __init__(self, output: Path, source: StateSource, settings: CheckpointConfig) -> None:
        self._output, self._source, self._settings = output, source, settings
        self._host = HostCopy()
        self._job: _Job | None = None
        self._complete: list[Path] = []
        self._needed: dict[tuple[tuple[str, ...], ...], int] = {}  # bytes over all ranks, by kinds: always the same
        self.waited = 0.0  # seconds in `settle`

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed; `finish` tells why, on all ranks."""
        return self._job is not None and self._job.problem is not None

    def save(self, step: int, trainer: dict[str, Any], *, checkpoint: bool = True, export: bool = False) -> None:
        """Begin to write `output`/checkpoints/step_`step` (export: .../exports/step_`step`, the weights alone).

        trainer: what the training loop needs to go on, JSON. A save under way is finished first. Raises
        CheckpointError on all ranks if a rank cannot write; what was saved before is then as it was.
        """
        self.finish()
        targets = []
        if checkpoint:
            targets.append(_Target(step_folder(self._output, step), KINDS))
        if export:
            targets.append(_Target(step_folder(self._output, step, export=True), KINDS[:1]))
        fragments = list(self._source.local_state())
        self._make_room(targets, fragments)
        if self._source.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the thread has a stream of its own
        document = document_head(self._source.config, step)
        self._job = job = _Job(targets, fragments, document, {"step": step, **trainer})
        job.thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        job.thread.start()
        if not self._settings.async_save:
            self.finish()

    def settle(self) -> None:
        """Wait until the state may change: the save under way has its copy. Not collective."""
        if self._job is not None and not self._job.copied.is_set():
            started = time.perf_counter()
            self._job.copied.wait()
            self.waited += time.perf_counter() - started

    def finish(self) -> None:
        """Wait until nothing is under way. Raises CheckpointError, on all ranks, if the save has failed."""
        job, mesh = self._job, self._source.mesh
        self._job = None
        if job is None:
            return
        job.written.wait()
        busy, problem = job.busy(), job.problem  # in this order: what has ended has said what failed
        own = _FAILED if problem else _BUSY if busy else 0
        worst = int(all_reduce(torch.tensor([own], device=mesh.device), mesh, "world", op="max"))
        if not worst:
            return
        job.join(0.0 if worst == _FAILED else NOTE_SECONDS)
        if worst == _BUSY:
            problem = job.problem
            if agree(problem is None, mesh):
                return
        if mesh.rank == 0:
            for target in job.targets:
                shutil.rmtree(target.writing, ignore_errors=True)  # it may have filled the disk
        self._raise_everywhere(problem)

    def take_complete(self) -> list[Path]:
        """The folders that were completed since the last call; on rank 0."""
        complete, self._complete = self._complete, []
        return complete

    def close(self) -> None:
        """Let a save under way come to its end, without a word to the other ranks: they may be gone."""
        if self._job is not None:
            self._job.join(LAST_NOTE_SECONDS)
        self._host.release()

    def _make_room(self, targets: Sequence[_Target], fragments: Sequence[StateFragment]) -> None:
        """Make the folders, where there is space for what all ranks will write: one folder is one file system."""
        mesh, kinds = self._source.mesh, tuple(target.kinds for target in targets)
        if kinds not in self._needed:
            held = [(kind, num_bytes(value)) for part in fragments for kind, value in part.values.items()]
            mine = sum(size for group in kinds for kind, size in held if kind in group)
            self._needed[kinds] = int(all_reduce(torch.tensor([mine], device=mesh.device), mesh, "world"))
        needed, problem = self._needed[kinds], None
        if mesh.rank == 0:
            try:
                for target in targets:
                    make_empty(target.writing)
                folder = targets[0].writing
                if (free := shutil.disk_usage(folder).free) < needed:
                    for target in targets:
                        target.writing.rmdir()
                    problem = (
                        f"{folder}: {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free; free "
                        "some space, or keep fewer checkpoints (neomoba.checkpoint.keep_last)"
                    )
            except CheckpointError as error:
                problem = str(error)
        if not agree(problem is None, mesh):
            self._raise_everywhere(problem)

    def _raise_everywhere(self, problem: str | None) -> NoReturn:
        """The first rank's problem, on all ranks; one of them has one."""
        problems = all_gather_objects(problem, self._source.mesh, "world")
        raise AgreedCheckpointError(next(problem for problem in problems if problem))

    def _run(self, job: _Job) -> None:
        """The thread of a save. Raises nothing: the main thread reads `problem`."""
        try:
            fragments = job.fragments
            if self._settings.async_save:
                fragments = self._host.copy(fragments)
                job.copied.set()
            for target in job.targets:
                write_fragments(target.writing, self._source.mesh.rank, fragments, target.kinds)
            job.written.set()
            if self._source.mesh.rank == 0:
                self._complete_save(job)
        except CheckpointError as error:
            job.problem = str(error)
        except Exception as error:
            job.problem = f"checkpoint of step {job.document['step']}: {error!r}"
        finally:
            job.copied.set()
            job.written.set()

    def _complete_save(self, job: _Job) -> None:
        """What rank 0 does once it sees all notes. Raises CheckpointError."""
        ranks = self._source.mesh["world"].size
        for target in job.targets:
            for rank in range(ranks):
                while not note_path(target.writing, rank).exists():
                    if time.monotonic() > job.deadline:
                        raise CheckpointError(
                            f"{target.writing}: rank 0 does not see what rank {rank} has written; put the run folder "
                            "on a disk that all machines see"
                        )
                    time.sleep(POLL_SECONDS)
            commit(target.writing, target.final, ranks, job.document, job.trainer)
            self._complete.append(target.final)
        try:
            remove_old(self._output, self._settings.keep_last, self._settings.keep_every)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be removed ({error.strerror})") from error


def save_checkpoint(output: Path, step: int, source: StateSource, trainer: dict[str, Any]) -> Path:
    """Write one checkpoint and wait for it; returns the folder. Arguments and errors as `CheckpointSaver.save`."""
    CheckpointSaver(output, source, CheckpointConfig(async_save=False)).save(step, trainer)
    return step_folder(output, step)
