"""The smallest configuration that loads, for tests."""

import copy
from typing import Any

from neomoba_dist.config import Config, parse_config

MINIMAL: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "neomoba": {
        "data": {"train": "shards"},
        "phase": {"name": "p", "steps": 10, "sequence_length": 64, "tokens_per_update": 512, "learning_rate": 1e-3},
    },
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of MINIMAL with `changes`, given as dotted paths ("neomoba.phase.steps")."""
    tree = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        *parents, last = key.split(".")
        block = tree
        for name in parents:
            block = block.setdefault(name, {})
        block[last] = value
    return tree


def build(changes: dict[str, Any]) -> Config:
    """Return the Config of MINIMAL with `changes`; errors name the source FILE."""
    return parse_config(changed(changes), source="FILE")
