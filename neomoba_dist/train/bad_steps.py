"""Updates that must not be taken: a loss or gradient norm that is not finite, or far above the last ones.

The verdict comes from numbers that all ranks hold bit for bit alike, by sums that round once (math.fsum), so that all
ranks come to the same one on any processor. The window of the last steps is part of the checkpoint: a resumed run
decides as the undisturbed one does.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypedDict

import torch

from neomoba_dist.config.schema import HealthConfig

# steps that a spike is measured against; before there are so many, nothing counts as one. Skipped ones are among them:
# weights stay, so a rise that lasts would be met again and again, and end a run that begins to learn something new
WINDOW = 128


class JudgeState(TypedDict):
    """All that a resume needs; the same on every rank. losses, grad_norms: of the last steps whose were finite."""

    losses: list[float]
    grad_norms: list[float]
    skipped: int
    in_a_row: int


class StepJudge:
    """Whether an update may be taken. skipped: updates of the whole run that were not; in_a_row: the last ones."""

    def __init__(self, settings: HealthConfig) -> None:
        self._sigma = settings.spike_sigma
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.skipped = self.in_a_row = 0

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """Why the update must not be taken, in words; None if it may. loss: nats per token, the mean of the update."""
        for (name, window), value in zip(self._windows.items(), (loss, grad_norm), strict=True):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if not self._sigma or len(window) < WINDOW:
                continue
            mean = math.fsum(window) / WINDOW
            deviation = math.sqrt(math.fsum((known - mean) ** 2 for known in window) / WINDOW)
            if value > mean + self._sigma * deviation:
                return (
                    f"the {name} {value:.4g} is more than {self._sigma:g} sigma above the last {WINDOW} steps "
                    f"({mean:.4g}, sigma {deviation:.2g})"
                )
        return None

    def record(self, loss: float, grad_norm: float, *, skipped: bool) -> None:
        """What became of an update."""
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for window, value in zip(self._windows.values(), (loss, grad_norm), strict=True):
                window.append(value)

    def state_dict(self) -> JudgeState:
        """Numbers that JSON keeps exactly."""
        losses, grad_norms = (list(window) for window in self._windows.values())
        return JudgeState(losses=losses, grad_norms=grad_norms, skipped=self.skipped, in_a_row=self.in_a_row)

    def load_state_dict(self, state: JudgeState) -> None:
        """Go on where `state` was taken."""
        for window, values in zip(self._windows.values(), (state["losses"], state["grad_norms"]), strict=True):
            window.clear()
            window.extend(values)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def guard_step(zero: Any, optimizer: torch.optim.Optimizer, decide: Callable[[], tuple[bool, float]]) -> None:
    """Have `decide` called before every step of DeepSpeed's ZeRO optimizer `zero` around `optimizer`.

    It returns whether AdamW may step, and the gradient norm, by which DeepSpeed then clips: the one that is logged, in
    place of a second one with a launch and a look from the host for every parameter.
    DeepSpeed's own step runs in any case, because it clears gradients and moves the loss scale of fp16; only AdamW does
    not: weights and moments stay as they are, and DeepSpeed copies the former, unchanged, to those that compute.
    """
    zero_step, adamw_step = zero.step, optimizer.step
    taken, scaled = False, torch.tensor(math.inf)  # no step precedes the first verdict

    def decided() -> None:
        nonlocal taken, scaled
        taken, norm = decide()
        scaled = torch.tensor(norm * zero.loss_scale if math.isfinite(norm) else math.inf)
        zero_step()
        zero.loss_scaler.update_scale(zero.overflow)
        if zero.overflow:  # with offload DeepSpeed would add the next update's gradients to those of this one
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    zero.step = decided
    zero.scaled_global_norm = lambda: scaled
    zero._get_norm_groups = lambda: [scaled]  # at stage 3
    zero._update_scale = lambda overflow: None  # DeepSpeed would divide this step's gradients by the next one's scale
    optimizer.step = lambda: adamw_step() if taken else None  # type: ignore[assignment]
