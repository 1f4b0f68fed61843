"""The run log: metrics.jsonl (one object per step), TensorBoard, optionally W&B, and a readable line per step."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neomoba_dist.config import Config
from neomoba_dist.errors import FailedError

METRICS_FILE = "metrics.jsonl"
NO_CURVES = ("tokens_per_expert", "row_ids", "rank_seconds")  # lists that are not one number per layer
MOST_CURVES = 16  # layers that TensorBoard and W&B show; of deeper models an even choice, metrics.jsonl has them all
ROUTING_LISTS = ("kl_to_uniform", "max_violation", "router_entropy")  # one number per layer with experts


class RunLogError(FailedError):
    """The log cannot be written; the message is one line."""


class RunLog:
    """Written by one rank. start_step: the step that the run goes on from; what the file holds beyond it is dropped."""

    def __init__(self, output: Path, config: Config, start_step: int, last_step: int) -> None:
        self.config = config
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        self._path = path = output / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if path.exists() else []
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)
        self._wandb = _start_wandb(output, config) if config.log.wandb_project else None
        self._bar = tqdm(total=last_step, initial=start_step, unit="step", desc=config.phase.name, disable=None)
        self._remaining = last_step - start_step
        self._seconds = 0.0
        self._steps = 0

    def step(self, entry: dict[str, Any]) -> None:
        """Record one step. `entry` holds at least the keys that the format promises. Raises RunLogError."""
        try:
            self._file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise RunLogError(
                f"{self._path}: cannot be written ({error.strerror}); free space there and start again"
            ) from error
        scalars = self._scalars(entry)
        if self._tensorboard:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, entry["step"])
            for name, rows in self._of_layers("tokens_per_expert", entry.get("tokens_per_expert", ())):
                _add_bars(self._tensorboard, name, rows, entry["step"])
        if self._wandb:
            self._wandb.log(scalars, step=entry["step"])
        self._steps += 1
        self._remaining -= 1
        self._seconds += entry["step_seconds"]
        self._bar.update(1)
        tqdm.write(self._line(entry), file=sys.stdout)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        with suppress(OSError):  # of a line that `step` could not write
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        """The numbers of an entry; those of single layers by name."""
        scalars: dict[str, float] = {}
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "step":
                scalars[key] = value
            elif isinstance(value, list) and key not in NO_CURVES:
                scalars |= dict(self._of_layers(key, value))
        return scalars

    def _of_layers(self, key: str, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """Name and value of the layers that are shown; numbers have as many digits as the last one has."""
        experts = key in (*ROUTING_LISTS, "tokens_per_expert")
        layers: Sequence[int] = self.config.model.moe_layers if experts else range(len(values))
        last = len(values) - 1
        shown = (
            {round(i * last / (MOST_CURVES - 1)) for i in range(MOST_CURVES)}
            if last >= MOST_CURVES
            else range(last + 1)
        )
        digits = len(str(max(layers, default=0)))
        for place in sorted(shown):
            yield f"{key}/layer_{layers[place]:0{digits}}", values[place]

    def _line(self, entry: dict[str, Any]) -> str:
        left = int(self._seconds / self._steps * self._remaining)
        parts = [
            f"{entry['phase']} {entry['step']}/{self.config.phase.steps}",
            f"loss {entry['loss']:.4f}",
            f"grad norm {entry['grad_norm']:.3f}",
            f"lr {entry['lr']:.2e}",
            f"{entry['tokens_per_second']:,.0f} tokens/s",
            f"{entry['step_seconds']:.2f} s",
        ]
        if entry["skipped"]:
            parts.append("skipped")
        if entry["skipped_steps"]:
            parts.append(f"skipped so far {entry['skipped_steps']}")
        if "max_violation" in entry:
            parts.append(f"max violation {max(entry['max_violation']):.2f}")
        for key in entry:
            if key.startswith("validation_"):
                parts.append(f"{key.replace('_', ' ')} {entry[key]:.4f}")
        if entry["full_attention"] and self.config.phase.full_attention_fraction < 1.0:
            parts.append("full attention")
        parts.append(f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        return " | ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl. What follows a line that a crash has cut is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            entry["step"]
        except (ValueError, TypeError, KeyError):
            break
        entries.append(entry)
    return entries


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _add_bars(tensorboard: Any, tag: str, heights: Sequence[int], step: int) -> None:
    """A histogram whose bar i is as high as heights[i]."""
    number = len(heights)
    total = sum(heights)
    mean = sum(i * height for i, height in enumerate(heights))
    squares = sum(i * i * height for i, height in enumerate(heights))
    limits = [i + 0.5 for i in range(number)]
    tensorboard.add_histogram_raw(tag, 0, number - 1, total, mean, squares, limits, list(heights), step)


def _start_wandb(output: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        logging.getLogger(__name__).warning(
            "neomoba.log.wandb_project is set but wandb is not installed: pip install wandb"
        )
        return None
    return wandb.init(project=config.log.wandb_project, name=output.name, dir=str(output), config=config.to_dict())
