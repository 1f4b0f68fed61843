"""The training loop of one phase: data, update, validation, log, checkpoint, in that order, in plain sight."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.save import save_checkpoint, set_aside_newer
from neomoba_dist.config import Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.parallel.comm import all_reduce, on_first_rank
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.expert_metrics import StarvationWatch, routing_entry
from neomoba_dist.train.flops import step_flops
from neomoba_dist.train.guard import require_equal_batches
from neomoba_dist.train.metrics import RunLog, is_finite
from neomoba_dist.train.optim import learning_rate
from neomoba_dist.train.phases import is_full_attention
from neomoba_dist.train.profile import step_profiler


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why and from where to go on."""


class Trainer:
    """Runs the steps of one phase. `validation`: this rank's fixed micro-batches, empty for no validation."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Engine,
        stream: UpdateStream,
        validation: Sequence[Batch],
        output: Path,
    ) -> None:
        self.config, self.mesh, self.engine = config, mesh, engine
        self.stream, self.output = stream, output
        self.validation = list(validation)
        self.step = self._first_step = 0
        self.tokens = 0
        self._starvation = StarvationWatch(config.model)
        self._validation_count = self._sum_over_data([sum(batch.local_valid() for batch in self.validation)])[0]
        self.validation = [replace(batch, num_valid=int(self._validation_count)) for batch in self.validation]

    def start_from(self, reader: CheckpointReader) -> None:
        """Take the weights of another phase; the optimizer and the data start anew."""
        self.engine.load(reader, moments=False)

    def resume(self, reader: CheckpointReader, *, allow_data_change: bool = False) -> None:
        """Go on exactly where the checkpoint was written; with `allow_data_change` even if the data are others."""
        state = reader.trainer()
        self.engine.load(reader, moments=True)
        self.stream.load_state_dict(state["data"], allow_data_change=allow_data_change)
        self.step, self.tokens = state["step"], state["tokens"]

    def run(self, last_step: int, *, profile: bool = False) -> None:
        """Train up to and including step `last_step`, then write a checkpoint."""
        on_first_rank(self.mesh, lambda: set_aside_newer(self.output, self.step))
        try:
            log = RunLog(self.output, self.config, self.step, last_step) if self.mesh.rank == 0 else None
        except OSError as error:
            raise TrainingError(f"{self.output}: the run log cannot be written ({error.strerror})") from error
        profiled = self.output if profile and self.mesh.rank == 0 else None
        updates, watched = iter(self.stream), bool(self.config.model.moe_layers)
        self._first_step = self.step
        try:
            with step_profiler(profiled, self.mesh.rank) as profiler:
                while self.step < last_step:
                    entry = self._train_step(updates, last_step)
                    if log:
                        log.step(entry)
                        for warning in self._starvation.warnings(entry["tokens_per_expert"]) if watched else ():
                            log.say(warning)
                    if profiler:
                        profiler.step()
                    self._stop_if_not_finite(entry)
                    if self.step % self.config.checkpoint.save_every == 0 or self.step == last_step:
                        folder = self.save()
                        if log:
                            log.say(f"checkpoint {folder}")
        finally:
            updates.close()
            if log:
                log.close()

    def save(self) -> Path:
        """Write a checkpoint of this step; returns its folder."""
        state = {
            "tokens": self.tokens,
            "optimizer_step": self.engine.optimizer_step(),
            "loss_scale": self.engine.loss_scale(),
            "data": self.stream.state_dict(),
            "world_size": self.mesh["world"].size,
        }
        return save_checkpoint(self.output, self.step, self.engine, state, self.config.checkpoint.keep_last)

    def _train_step(self, updates: Iterator[tuple[list[Batch], Any]], last_step: int) -> dict[str, Any]:
        start = time.perf_counter()
        phase = self.config.phase
        step = self.step + 1
        full = is_full_attention(phase, step)
        rate = learning_rate(phase, step)
        batches, _ = next(updates)
        if (self.step - self._first_step) % self.config.data.check_every == 0:
            require_equal_batches(batches, self.mesh)
        data_seconds = time.perf_counter() - start
        counted = batches[0].num_valid  # the stream's count over this rank's micro-batches
        num_valid, flops = self._sum_over_data([counted, self._flops(batches, counted, full)])
        if num_valid == 0:
            raise TrainingError(f"step {step}: no token of the update counts; raise neomoba.phase.tokens_per_update")
        self.engine.set_full_attention(full)
        self.engine.set_step(step)
        before = self.mesh.ledger.received()
        result = self.engine.update([replace(batch, num_valid=int(num_valid)) for batch in batches], rate)
        received = self.mesh.ledger.received()
        self.step = step
        tokens = phase.tokens_per_update
        self.tokens += tokens
        seconds = time.perf_counter() - start
        entry = {
            "step": step,
            "phase": phase.name,
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": tokens,
            "valid_tokens": int(num_valid),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "tflops_per_rank": flops / seconds / self.mesh["world"].size / 1e12,
            "data_seconds": data_seconds,
            "skipped_rows": self.stream.skipped_rows,
            "full_attention": full,
            "skipped": result.skipped,
            "activation_rms": result.activation_rms,
            "layer_grad_norms": result.layer_grad_norms[:-1],
            # what this rank got through our own collectives; megatron-core's and DeepSpeed's are not counted
            **{f"received_mib_{axis}": (n - before.get(axis, 0)) / 2**20 for axis, n in received.items()},
        }
        if result.routing is not None:
            entry |= routing_entry(result.routing, self.config.model)
        if self.validation and (step % self.config.log.validate_every == 0 or step == last_step):
            # always with the phase's usual attention, or the curve would jump at every full step
            self.engine.set_full_attention(phase.full_attention_fraction == 1.0)
            entry["validation_loss"] = self.engine.evaluate(self.validation) / self._validation_count
        return entry

    def _flops(self, batches: Sequence[Batch], counted: int, full: bool) -> int:
        lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
        return step_flops(self.config.model, lengths[lengths > 0], counted, full)

    def _sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sums over the data-parallel ranks; float64 holds counts up to 2^53 exactly."""
        local = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        return all_reduce(local, self.mesh, "dp").tolist()

    def _stop_if_not_finite(self, entry: dict[str, Any]) -> None:
        if entry["skipped"] or is_finite(entry["loss"], entry["grad_norm"]):
            return
        raise TrainingError(
            f"step {entry['step']}: loss {entry['loss']}, gradient norm {entry['grad_norm']} are not finite; nothing "
            "was saved since the last checkpoint: resume from it with a lower neomoba.phase.learning_rate"
        )
