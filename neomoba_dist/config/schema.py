"""The keys of the "neomoba" block as frozen dataclasses: names, types and defaults. ds_configs/README.md explains each key.

A field without a default must be given in the JSON. `Literal` fields list the values that are accepted.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from neomoba_dist.config.batch import BatchPlan, plan_batch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, independent of how it is cut over ranks. Sizes count elements, `rope_theta` is the RoPE base."""

    objective: Literal["mlm", "clm"] = "mlm"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int = 3072
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    moba_block_size: int = 512
    moba_top_k: int = 3
    hybrid_layer_count: int = 3
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Resolve `head_dim`, so that no reader has to know its default."""
        if self.head_dim is None and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and earlier ones (`objective` "clm")."""
        return self.objective == "clm"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes in ranks; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards lie and how rows become training examples."""

    train: str
    validation: str | None = None
    mlm_probability: float = 0.2
    mlm_scheme: Literal["80/10/10", "all"] = "80/10/10"
    max_documents_per_row: int = 128


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training phase: its length, batch, optimizer (AdamW), schedule, attention schedule and memory settings."""

    name: str
    steps: int
    sequence_length: int
    tokens_per_update: int
    learning_rate: float
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    full_attention_fraction: float = 1.0
    full_attention_schedule: Literal["tail", "interleave"] = "tail"
    recompute: Literal["none", "full", "selective"] = "none"
    recompute_every: int = 1
    compile: bool = False
    allow_tf32: bool = True
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a checkpoint is written, in steps, and how many are kept (0 = all)."""

    save_every: int = 1000
    keep_last: int = 0


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the run log goes besides metrics.jsonl, and how often the validation rows are run, in steps."""

    tensorboard: bool = True
    wandb_project: str | None = None
    validate_every: int = 500
    validation_rows: int = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """One resolved configuration file. `deepspeed` holds DeepSpeed's own keys as given (read-only)."""

    data: DataConfig
    phase: PhaseConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: Mapping[str, Any]
    source: str = field(default="config", compare=False)

    def __post_init__(self) -> None:
        """Copy DeepSpeed's keys, so that no later change of the caller's dictionary reaches this object."""
        object.__setattr__(self, "deepspeed", MappingProxyType(copy.deepcopy(dict(self.deepspeed))))

    @property
    def micro_batch_size(self) -> int:
        """Rows of one micro-batch of one data-parallel rank."""
        return int(self.deepspeed["train_micro_batch_size_per_gpu"])

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: 1, 2 or 3."""
        return int(self.deepspeed["zero_optimization"]["stage"])

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16", "float16"]:
        """Compute dtype, as `torch` names it."""
        if _enabled(self.deepspeed.get("bf16")):
            return "bfloat16"
        return "float16" if _enabled(self.deepspeed.get("fp16")) else "float32"

    @property
    def gradient_clipping(self) -> float:
        """Largest gradient norm; 0 = no clipping."""
        return float(self.deepspeed.get("gradient_clipping", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole JSON again with every default resolved; `parse_config` of it gives an equal Config."""
        blocks = {name: dataclasses.asdict(getattr(self, name)) for name in BLOCKS}
        return {**copy.deepcopy(dict(self.deepspeed)), "neomoba": blocks}

    def plan(self, world_size: int) -> BatchPlan:
        """Return the batch arithmetic for `world_size` ranks. Raises ConfigError when it does not close."""
        return plan_batch(self, world_size)


BLOCKS: Mapping[str, type] = MappingProxyType(
    {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "data": DataConfig,
        "phase": PhaseConfig,
        "checkpoint": CheckpointConfig,
        "log": LogConfig,
    }
)


def _enabled(block: Mapping[str, Any] | None) -> bool:
    return bool(block) and bool(block.get("enabled", False)) if block else False
