"""The training loop of one phase: data, update, validation, log, checkpoint, in that order, in plain sight."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neomoba_dist.checkpoint.files import write_text
from neomoba_dist.checkpoint.keep import start_from
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.save import CheckpointSaver
from neomoba_dist.config import Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.examples import ExampleStream
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.errors import FailedError
from neomoba_dist.parallel.comm import on_first_rank, sum_together
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.bad_steps import StepJudge
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.expert_metrics import StarvationWatch, routing_entry
from neomoba_dist.train.flops import step_flops
from neomoba_dist.train.guard import require_agreement
from neomoba_dist.train.health import Watchdog
from neomoba_dist.train.look_ahead import LookAhead
from neomoba_dist.train.metrics import RunLog
from neomoba_dist.train.optim import learning_rate
from neomoba_dist.train.phases import is_full_attention
from neomoba_dist.train.profile import step_profiler
from neomoba_dist.train.stop import StopRequests
from neomoba_dist.train.stragglers import EVERY, Stragglers, straggler_line

INTERRUPTED_FILE = "INTERRUPTED"


class TrainingError(FailedError):
    """Training cannot go on; the message is one line that says why and from where to go on."""


class AgreedTrainingError(TrainingError):
    """The same on every rank."""

    on_all_ranks = True


class Asked(NamedTuple):
    """What any rank asks for at the end of a step: by the files SAVE and STOP, a save that failed, a signal."""

    save: bool
    stop: bool
    failed: bool
    interrupted: bool


class Trainer:
    """Runs the steps of one phase. `validation`: this rank's fixed micro-batches, empty for no validation."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Engine,
        stream: UpdateStream | ExampleStream,
        validation: Sequence[Batch],
        output: Path,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.mesh, self.engine = config, mesh, engine
        self.stream, self.output, self.watchdog = stream, output, watchdog
        self.interrupted = self.finished = False
        self.validation = list(validation)
        self.step = self._first_step = 0
        self.tokens = 0
        self.judge = StepJudge(config.health)
        self.saver = CheckpointSaver(output, engine, config.checkpoint)
        engine.before_step(self.saver.settle)
        self._pause = self._data_seconds = 0.0
        self._starvation = StarvationWatch(config.model)
        self._stragglers = Stragglers(mesh)
        # one rank of each model replica speaks for it where all of them know the same
        self._speaks = all(mesh[axis].index == 0 for axis in ("tp", "cp", "pp"))
        counted = sum(batch.local_valid() for batch in self.validation)
        counts = self._sum_over_replicas(counted, sum(batch.num_pairs for batch in self.validation))
        self.validation = [replace(batch, **counts) for batch in self.validation]
        self._counts: dict[str, Any] = {"num_valid": 0, "num_pairs": 0}  # of the update to come, over all ranks
        self._data_state = stream.state_dict()

    def start_from(self, reader: CheckpointReader) -> None:
        """Take the weights of another phase; the optimizer and the data start anew."""
        self.engine.load(reader, moments=False)

    def resume(self, reader: CheckpointReader, *, allow_data_change: bool = False) -> None:
        """Go on exactly where the checkpoint was written; with `allow_data_change` even if the data are others."""
        state = reader.trainer()
        self.engine.load(reader, moments=True)
        self.stream.load_state_dict(state["data"], allow_data_change=allow_data_change)
        self.step, self.tokens = state["step"], state["tokens"]
        if "judge" in state:  # not in checkpoints of earlier versions
            self.judge.load_state_dict(state["judge"])

    def run(self, last_step: int, *, profile: bool = False) -> None:
        """Train up to and including step `last_step`, or until asked to stop; then write a checkpoint.

        Asked by the file STOP, or on any rank by a signal (StopRequests): then `interrupted` is set, and the file
        INTERRUPTED in the run folder says so, and why.
        """
        on_first_rank(self.mesh, lambda: start_from(self.output, self.step))
        on_first_rank(self.mesh, lambda: (self.output / INTERRUPTED_FILE).unlink(missing_ok=True))
        try:
            log = RunLog(self.output, self.config, self.step, last_step) if self.mesh.rank == 0 else None
        except OSError as error:
            raise TrainingError(f"{self.output}: the run log cannot be written ({error.strerror})") from error
        profiled = self.output if profile and self.mesh.rank == 0 else None
        say = log.say if log else lambda line: None
        updates, watched, last = LookAhead(self.stream), bool(self.config.model.moe_layers), self.step == last_step
        self._first_step = self.step
        self.engine.forward_timer.take()  # of a rehearsal
        try:
            with step_profiler(profiled, self.mesh.rank) as profiler, StopRequests() as requests:
                if not last:
                    updates.fetch()
                    self._counts = self._sum_over_replicas(updates.counted, updates.pairs)
                while not last:
                    entry, asked = self._train_step(updates, requests, last_step)
                    if log:
                        log.step(entry)
                        if "slowest_rank" in entry:
                            say(straggler_line(entry))
                        for warning in self._starvation.warnings(entry["tokens_per_expert"]) if watched else ():
                            say(warning)
                    if profiler:
                        profiler.step()
                    if "skip_reason" in entry:
                        self._tell_skipped(entry, say)
                    last = self._save_if_due(last_step, asked, requests, say)
                    if self.watchdog:
                        self.watchdog.step_done(self.step)
        except BaseException:
            if self.watchdog:
                self.watchdog.leaving()
            raise
        finally:
            updates.close()
            self.saver.close()
            if log:
                log.close()

    def _save_if_due(self, last_step: int, asked: Asked, requests: StopRequests, say: Callable[[str], None]) -> bool:
        """Save where the configuration, a file in the run folder or a signal asks for it; whether the run ends here.

        SAVE asks for a checkpoint, STOP for the last one. Collective over the world where something is due.
        """
        started, step, settings = time.perf_counter(), self.step, self.config.checkpoint
        save, stop, failed, interrupted = asked
        for name, found in (("SAVE", save), ("STOP", stop)):
            if found and self.mesh.rank == 0:
                (self.output / name).unlink(missing_ok=True)
        last = stop or interrupted or self.finished or step == last_step
        checkpoint = last or save or step % settings.save_every == 0
        export = settings.export_every > 0 and step % settings.export_every == 0
        if failed or checkpoint or export:
            self._survive(self.saver.finish, say)
        if checkpoint or export:
            write = functools.partial(self.saver.save, step, self._state(), checkpoint=checkpoint, export=export)
            write() if last else self._survive(write, say)
            if last:
                self.saver.finish()
            self._pause = time.perf_counter() - started
        for folder in self.saver.take_complete():
            say(f"checkpoint {folder}")
        if (interrupted or stop) and step < last_step:
            self.interrupted = True
            reason = requests.reason or ("STOP" if stop else "a signal to another rank")
            on_first_rank(self.mesh, lambda: write_text(self.output / INTERRUPTED_FILE, f"step {step}: {reason}\n"))
            say(f"stopped after step {step}: {reason}; start again to go on")
        return last

    def _survive(self, action: Callable[[], None], say: Callable[[str], None]) -> None:
        """Do what may fail for a full disk; by neomoba.checkpoint.on_save_failure training goes on all the same."""
        try:
            action()
        except CheckpointError as error:
            if self.config.checkpoint.on_save_failure == "stop":
                raise
            say(f"warning: {error}; training goes on, and the checkpoints before are as they were")

    def _state(self) -> dict[str, Any]:
        """What a resumed run must know beside the tensors."""
        return {
            "tokens": self.tokens,
            "optimizer_step": self.engine.optimizer_step(),
            "loss_scale": self.engine.loss_scale(),
            "loss_scaler": self.engine.loss_scaler(),
            "data": self._data_state,
            "judge": self.judge.state_dict(),
            "world_size": self.mesh["world"].size,
        }

    def _train_step(self, updates: LookAhead, requests: StopRequests, last_step: int) -> tuple[dict[str, Any], Asked]:
        """One update, from data to weights: its entry for the log, and what any rank asks for."""
        start = time.perf_counter()
        phase = self.config.phase
        step = self.step + 1
        full = is_full_attention(phase, step)
        rate = learning_rate(phase, step)
        update, counts = updates.take(), self._counts
        if (self.step - self._first_step) % self.config.data.check_every == 0:
            require_agreement(update.batches, self.engine.module, self.config.zero_stage, self.mesh)
        if counts["num_valid"] == 0:
            raise AgreedTrainingError(
                f"step {step}: no token of the update counts; raise neomoba.phase.tokens_per_update"
            )
        flops = self._flops(update.batches, updates.counted, full)
        self.engine.set_full_attention(full)
        self.engine.set_step(step)
        before = self.mesh.ledger.received()

        def report() -> dict[str, list[float]]:
            self._data_seconds = updates.fetch() if step < last_step else 0.0
            files = [self.mesh.rank == 0 and (self.output / name).exists() for name in ("SAVE", "STOP")]
            return {
                "of_replica": [updates.counted, updates.pairs, flops] if self._speaks else [0, 0, 0],
                "asked": [*files, self.saver.failed, requests.asked()],
                "rank_seconds": self._stragglers.part(self._data_seconds + self.engine.forward_timer.take()),
            }

        batches = [replace(batch, **counts) for batch in update.batches]
        result = self.engine.update(batches, rate, self.judge.problem, report)
        if not result.overflow:
            self.judge.record(result.loss, result.grad_norm, skipped=result.problem is not None)
        *following, operations = result.report["of_replica"]
        self._counts = dict(zip(self._counts, map(int, following), strict=True))
        self._data_state = update.state
        received = self.mesh.ledger.received()
        self.step = step
        tokens = phase.tokens_per_update
        self.tokens += tokens
        seconds = time.perf_counter() - start
        self._stragglers.add(result.report["rank_seconds"], seconds)
        entry = {
            "step": step,
            "phase": phase.name,
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            **result.parts,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": tokens,
            "valid_tokens": counts["num_valid"],
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "tflops_per_rank": operations / seconds / self.mesh["world"].size / 1e12,
            "data_seconds": self._data_seconds,
            "rows": update.state["rows"],
            "skipped_rows": update.skipped_rows,
            "full_attention": full,
            "skipped": result.overflow or result.problem is not None,
            "skipped_steps": self.judge.skipped,
            "activation_rms": result.activation_rms,
            "layer_grad_norms": result.layer_grad_norms[:-1],
            # what this rank got through our own collectives; megatron-core's and DeepSpeed's are not counted
            **{
                f"received_mib_{axis}": (number - before.get(axis, 0)) / 2**20
                for axis, number in received.items()
                if number > before.get(axis, 0)
            },
        }
        if result.problem:
            entry |= {"skip_reason": result.problem, "row_ids": self.stream.row_ids(update.state)}
        if step % EVERY == 0 and self.mesh["world"].size > 1:
            entry |= self._stragglers.entry()
        if self._pause:
            entry["checkpoint_pause_seconds"] = self._pause + self.saver.waited
            self._pause = self.saver.waited = 0.0
        if result.routing is not None:
            entry |= routing_entry(result.routing, self.config.model)
        if step % self.config.log.validate_every == 0 or step == last_step:
            # always with the phase's usual attention, or the curve would jump at every full step
            self.engine.set_full_attention(phase.full_attention_fraction == 1.0)
            entry |= self._validate()
        return entry, Asked(*(number > 0 for number in result.report["asked"]))

    def _validate(self) -> dict[str, float]:
        """What the log gets of a validation."""
        if not self.validation:
            return {}
        loss, parts = self.engine.evaluate(self.validation)
        return {"validation_loss": loss, **{f"validation_{name}": value for name, value in parts.items()}}

    def _flops(self, batches: Sequence[Batch], counted: int, full: bool) -> int:
        lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches]).long()
        encoders = [batch.encoder.cu_seqlens.diff() for batch in batches if batch.encoder]
        if encoders:
            return step_flops(self.config.model, lengths, counted, full, torch.cat(encoders).long())
        return step_flops(self.config.model, lengths[lengths > 0], counted, full)

    def _sum_over_replicas(self, num_valid: int, num_pairs: int) -> dict[str, Any]:
        """The sums over the data-parallel ranks of what the ranks of a model replica share: a Batch's counts."""
        sums = sum_together({"counts": [num_valid, num_pairs] if self._speaks else [0, 0]}, self.mesh)
        return dict(zip(("num_valid", "num_pairs"), map(int, sums["counts"].tolist()), strict=True))

    def _tell_skipped(self, entry: dict[str, Any], say: Callable[[str], None]) -> None:
        """Say which rows had to be skipped and why. AgreedTrainingError where it happens too often in a row."""
        step, rows, limit = entry["step"], entry["row_ids"], self.config.health.max_skipped_steps
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        look = f"python -m data_tools.inspect_shards --rows-of-step {step} --run {self.output}"
        say(f"warning: step {step} skipped: {entry['skip_reason']}; rows {shown}; their text: {look}")
        if self.judge.in_a_row >= limit:
            raise AgreedTrainingError(
                f"step {step}: {self.judge.in_a_row} steps in a row were skipped, the last one because "
                f"{entry['skip_reason']}; look at the text ({look}), then go on from the last checkpoint with a lower "
                "neomoba.phase.learning_rate, or with a higher neomoba.health.max_skipped_steps or spike_sigma"
            )
