"""Published architectures that compute what our layers compute: a table of them, one file for each kind.

What a configuration asks for and our layers do not compute is refused in one line that names it.
"""

from __future__ import annotations

from typing import Any

from neomoba_dist.checkpoint.hf_decoders import LLAMA, QWEN3, QWEN3_MOE
from neomoba_dist.checkpoint.hf_family import Family
from neomoba_dist.checkpoint.hf_modernbert import MODERNBERT
from neomoba_dist.checkpoint.hf_neobert import NEOBERT
from neomoba_dist.checkpoint.hf_neomoba import NEOMOBA
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.config import ModelConfig

FAMILIES: dict[str, Family] = {  # by model_type
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "llama": LLAMA,
    "neomoba": NEOMOBA,
    "neobert": NEOBERT,
    "modernbert": MODERNBERT,
}


def describe(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family a model goes out as, a published one where one fits, and its config.json. CheckpointError: none."""
    published = ["neobert", "modernbert"]
    if model.causal:
        published = ["qwen3_moe" if model.num_experts else "qwen3" if model.qk_norm else "llama"]
    for name in published:
        try:
            config = FAMILIES[name].from_model(model)
        except CheckpointError:
            continue
        return name, {"model_type": name, "architectures": [FAMILIES[name].architecture], **config}
    architecture = NEOMOBA.architecture if model.causal else "NeoMobaForMaskedLM"
    return "neomoba", {"model_type": "neomoba", "architectures": [architecture], **NEOMOBA.from_model(model)}
