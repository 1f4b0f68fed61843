"""Signs of life: every rank's in the rendezvous store, and the end of a run that no longer moves.

A thread of every rank writes there, once a second, how far the rank is and what it waits for. Rank 0's reads all of
them, and rank 1's that of rank 0; what they find wrong, the verdict, is written there for all. No collective is used,
so this works where collectives hang. A second thread sees to it that the first one is not stuck itself, where the
store's machine is cut off. Once there is a verdict the main thread has seconds to leave by itself; if it cannot, the
stacks of all threads go to disk and the process ends.
"""

import faulthandler
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil

from neomoba_dist.config.schema import HealthConfig
from neomoba_dist.parallel.comm import all_gather_objects
from neomoba_dist.parallel.launcher import rendezvous_store
from neomoba_dist.parallel.ledger import CommunicationError
from neomoba_dist.parallel.mesh import Mesh

PERIOD = 1.0  # seconds between signs of life
STUCK = 1800.0  # seconds without the end of a step while all live: longer than compilation, a save or a validation
SUSPICION = 4.0  # seconds of silence that are enough once a collective has failed somewhere
GRACE = 5.0  # seconds in which the main thread may leave by itself
CLEAN_UP = 20.0  # the same, where it has failed and is on its way out: a checkpoint may be under way
LINGER = 2 * PERIOD  # rank 0 may hold the store: the others must be able to read the verdict


class Peer(NamedTuple):
    """A rank's process, for the ranks of the same host. created: its start, in seconds since 1970."""

    host: str
    pid: int
    created: float

    @classmethod
    def me(cls) -> "Peer":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def exists(self) -> bool:
        """Whether the process is still there, and not another one of the same number."""
        try:
            return psutil.Process(self.pid).create_time() == self.created
        except psutil.Error:
            return False


class Sign(NamedTuple):
    """A sign of life. failed: a collective of the rank has failed. where: what it waits for or does; "" at its end."""

    beat: int
    failed: bool
    step: int
    where: str


class Watchdog:
    """Watches all ranks from `start` to `stop`.

    store: a connection of its own to the rendezvous. peers: of all ranks. pending: the collective of ours that this
    rank is in, in words. stacks: folder for the stacks of all threads of ranks that had to be ended.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        peers: Sequence[Peer],
        settings: HealthConfig,
        pending: Callable[[], str | None],
        stacks: Path,
    ) -> None:
        self._store, self._rank, self._peers, self._settings = store, rank, peers, settings
        self._pending, self._stacks = pending, stacks
        self._main = threading.get_ident()
        self._step, self._beat = 0, 0
        self._failed = self._leaving = False
        self._watched = list(range(1, len(peers))) if rank == 0 else [0] if rank == 1 else []
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}
        self._moved = self._contact = time.monotonic()
        self._stopped, self._decided, self._ending = (threading.Event() for _ in range(3))
        self._lock = threading.Lock()
        self._lost: list[int] = []
        self.verdict: str | None = None

    def start(self) -> None:
        """Begin; every rank."""
        self._store.set_timeout(timedelta(seconds=self._settings.lost_after))
        self._sign()  # at once: who is lost in the first second is missed, too
        for job in (self._run, self._watch_contact):
            threading.Thread(target=job, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """End, before a process leaves in good order: it is not missed."""
        self._stopped.set()
        with suppress(RuntimeError):  # nobody is there to be told
            self._store.set(f"sign {self._rank}", json.dumps(Sign(self._beat, False, self._step, "")))

    def step_done(self, step: int) -> None:
        """Told by the trainer after every step."""
        self._step, self._moved = step, time.monotonic()

    def leaving(self) -> None:
        """The main thread has failed and is on its way out."""
        self._leaving = True

    def blame(self) -> str | None:
        """A collective of this rank has failed: which rank is the cause, after seconds; None if all are alive."""
        self._leaving = self._failed = True
        self._decided.wait(SUSPICION + 5 * PERIOD)
        if self._ending.is_set():  # the verdict is said already, and the process about to end
            threading.Event().wait()
        return self.verdict

    def last_words(self, message: str) -> None:
        """This rank ends because of `message`, which the others shall hear."""
        self._leaving = True
        if len(self._peers) > 1 and self.verdict is None:
            self._stopped.set()  # this thread alone speaks to the store now
            try:
                self._store.compare_set("verdict", "", f"rank {self._rank} ended: {message}")
            except RuntimeError:
                return
            time.sleep(LINGER if self._rank == 0 else 0.0)

    def speaks(self) -> bool:
        """Whether this rank is the first one of its host that is still there; one line a host is enough."""
        host = self._peers[self._rank].host
        return self._rank == min(r for r, p in enumerate(self._peers) if p.host == host and r not in self._lost)

    def _sign(self) -> None:
        self._beat += 1
        sign = Sign(self._beat, self._failed, self._step, self._pending() or self._doing())
        self._store.set(f"sign {self._rank}", json.dumps(sign))

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self._sign()
                found = self._look()
                if self._store.check(["verdict"]):
                    found = self._store.get("verdict").decode()
                elif found:
                    found = self._store.compare_set("verdict", "", found).decode()
                self._contact = time.monotonic()
            except RuntimeError:  # lost contact is for the other thread to judge
                continue
            if found and not self._stopped.is_set():
                self._end(found)

    def _watch_contact(self) -> None:
        while not self._stopped.wait(PERIOD):
            silent = time.monotonic() - self._contact
            if self._rank and silent > self._patience(self._failed):
                self._lost = [0]
                self._end(
                    f"rank 0 ({self._peers[0].host}, process {self._peers[0].pid}) is killed, frozen or cut off: its "
                    f"rendezvous store has not answered rank {self._rank} ({self._peers[self._rank].host}) for "
                    f"{silent:.0f} s, in step {self._step + 1}, {self._waiting([self._rank])}"
                )

    def _patience(self, hurry: bool) -> float:
        return min(SUSPICION, self._settings.lost_after) if hurry else self._settings.lost_after

    def _look(self) -> str | None:
        """What is wrong with the ranks that this one watches, in one line."""
        now = time.monotonic()
        if self._watched:
            keys = [f"sign {rank}" for rank in self._watched]
            if not self._store.check(keys):
                return None
            for rank, text in zip(self._watched, self._store.multi_get(keys), strict=True):
                sign = Sign(*json.loads(text))
                before = self._signs.get(rank)
                if before is None or before.beat != sign.beat:
                    self._heard[rank] = now
                if before is None or before.step != sign.step:
                    self._moved = now
                self._signs[rank] = sign
        patience = self._patience(self._failed or any(sign.failed for sign in self._signs.values()))
        silent = {
            rank: now - heard
            for rank, heard in self._heard.items()
            if now - heard > patience and self._signs[rank].where
        }
        if silent:
            self._lost = sorted(silent)
            return self._describe_lost(max(silent.values()))
        if self._rank == 0 and now - self._moved > STUCK:
            return (
                f"no step has ended for {now - self._moved:.0f} s after step "
                f"{self._step}: {self._waiting(range(len(self._peers)))}"
            )
        return None

    def _describe_lost(self, seconds: float) -> str:
        names = [f"rank {rank} ({self._peers[rank].host}, process {self._peers[rank].pid})" for rank in self._lost[:8]]
        more = f" and {len(self._lost) - 8} more ranks" if len(self._lost) > 8 else ""
        sign = self._signs[self._lost[0]]
        others = [rank for rank in range(len(self._peers)) if rank not in self._lost]
        return (
            f"no sign of life from {', '.join(names)}{more} for {seconds:.0f} s: killed, frozen or cut off in step "
            f"{sign.step + 1}, last seen in {sign.where}; {self._waiting(others)}"
        )

    def _waiting(self, ranks: Sequence[int]) -> str:
        """Who of these waits for what, as far as this rank has read their signs."""
        places: dict[str, list[int]] = {}
        for rank in ranks:
            if rank == self._rank:
                places.setdefault(self._pending() or self._doing(), []).append(rank)
            elif rank in self._signs:
                places.setdefault(self._signs[rank].where, []).append(rank)
        return "; ".join(f"rank {', '.join(map(str, found[:8]))} in {place}" for place, found in places.items())

    def _doing(self) -> str:
        """The collective that a thread of this process waits in, whoever called it; else where the main thread is."""
        frames = sys._current_frames()
        for frame in frames.values():
            if name := collective_of(frame):
                return name
        return _place(frames[self._main]) if self._main in frames else "nothing"

    def _end(self, verdict: str) -> None:
        """End this process, by the main thread's own hand if it still can."""
        with self._lock:  # one of the two threads; it never comes back
            self.verdict = verdict
            self._decided.set()
            started = time.monotonic()
            while time.monotonic() < started + (CLEAN_UP if self._leaving else GRACE):
                if self._stopped.wait(0.1):
                    return
            self._ending.set()
            self._write_stacks()
            if self.speaks():
                print(f"error: {verdict}; stacks in {self._stacks}", file=sys.stderr, flush=True)
            time.sleep(LINGER if self._rank == 0 else 0.0)
            os._exit(1)

    def _write_stacks(self) -> None:
        """This rank's stacks, and as first of its host those of lost ranks, which are then ended; best effort."""
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if self.speaks():
                for rank in self._lost:
                    self._end_lost(rank)
        except (OSError, subprocess.SubprocessError, psutil.Error) as error:
            print(f"warning: no stacks of rank {self._rank}: {error}", file=sys.stderr, flush=True)

    def _end_lost(self, rank: int) -> None:
        """A frozen process keeps its launcher waiting."""
        peer = self._peers[rank]
        if peer.host != self._peers[self._rank].host or not peer.exists():
            return
        if spy := shutil.which("py-spy"):
            with (self._stacks / f"rank-{rank:05d}.txt").open("w") as file:
                words = [spy, "dump", "--nonblocking", "--pid", str(peer.pid)]
                subprocess.run(words, stdout=file, stderr=file, timeout=10, check=False)
        psutil.Process(peer.pid).kill()


@contextmanager
def watched(mesh: Mesh, settings: HealthConfig, stacks: Path) -> Iterator[Watchdog | None]:
    """A watchdog over what is done inside; None where a rank is alone. Collective over the world.

    A failure of this rank is told to the others. One that another rank has caused becomes a CommunicationError that
    names it, to be said once per host.
    """
    if mesh["world"].size == 1:
        yield None
        return
    peers = all_gather_objects(Peer.me(), mesh, "world")
    watchdog = Watchdog(rendezvous_store("health"), mesh.rank, peers, settings, lambda: mesh.ledger.pending, stacks)
    watchdog.start()
    try:
        yield watchdog
    except Exception as error:
        if not getattr(error, "on_all_ranks", False):
            if _failed_in_collective(error) and (verdict := watchdog.blame()):
                cause = CommunicationError(verdict)
                cause.on_all_ranks = not watchdog.speaks()
                raise cause from error
            watchdog.last_words(str(error))
        raise
    finally:
        watchdog.stop()


def _failed_in_collective(error: BaseException) -> bool:
    """Whether it comes out of a call of torch.distributed, ours or a library's."""
    if isinstance(error, CommunicationError):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return isinstance(error, RuntimeError) and last is not None and collective_of(last.tb_frame) is not None


def collective_of(frame: FrameType | None) -> str | None:
    """The torch.distributed call that a thread is in, and who called it: of ours, DeepSpeed's or megatron-core's."""
    name = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith("torch/distributed/distributed_c10d.py"):
            name = frame.f_code.co_name
        elif name and "torch/distributed/" not in file and "deepspeed/comm/" not in file:
            return f"{name} ({_place(frame)})"
        frame = frame.f_back
    return None


def _place(frame: FrameType) -> str:
    """File, line and function, as short as one can find them by."""
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
