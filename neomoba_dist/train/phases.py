"""Which steps of a phase run full attention in all layers.

Hybrid training (arXiv 2502.13189, section 3.2): most of the tokens with MoBA, the rest with full attention.
"""

import math

from neomoba_dist.config import PhaseConfig


def is_full_attention(phase: PhaseConfig, step: int) -> bool:
    """Whether update number `step` (1-based) runs full attention in the MoBA layers too.

    `full_attention_fraction` of the steps (rounded) do: the last ones ("tail") or evenly spread ("interleave").
    """
    full_steps = round(phase.full_attention_fraction * phase.steps)
    if phase.full_attention_schedule == "tail":
        return step > phase.steps - full_steps
    # step k is full where the running total of full steps rises
    return math.floor(step * full_steps / phase.steps) > math.floor((step - 1) * full_steps / phase.steps)
