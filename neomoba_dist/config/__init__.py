"""One JSON per phase: DeepSpeed's keys and a "neomoba" block, checked key by key and parsed into frozen dataclasses.

Importing this package is cheap: it needs the standard library only, so that `--help` and every
refusal come before torch.
"""

from neomoba_dist.config.batch import BatchPlan
from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.load import load_config, parse_config
from neomoba_dist.config.root import Config
from neomoba_dist.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
)

__all__ = [
    "BatchPlan",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "ParallelConfig",
    "PhaseConfig",
    "load_config",
    "parse_config",
]
