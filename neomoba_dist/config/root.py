"""The resolved configuration: the blocks of the schema, DeepSpeed's own keys, and what follows from both."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from neomoba_dist.config.batch import BatchPlan, plan_batch
from neomoba_dist.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    FinetuneConfig,
    HealthConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
)
from neomoba_dist.config.span_corruption import CorruptedLengths, corrupted_lengths

DEFAULT_GRADIENT_CLIPPING: Final = 1.0  # DeepSpeed 0.19's own default; earlier versions took 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One resolved configuration. `deepspeed` holds DeepSpeed's own keys, checked; `source` is named in errors."""

    data: DataConfig
    phase: PhaseConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: Mapping[str, Any]
    source: str = field(default="config", compare=False)

    def __post_init__(self) -> None:
        """Copy DeepSpeed's keys, so that no later change of the caller's dictionary reaches this object."""
        object.__setattr__(self, "deepspeed", copy.deepcopy(dict(self.deepspeed)))

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
        if self.deepspeed.get("bf16", {}).get("enabled", False):
            return "bfloat16"
        return "float16" if self.deepspeed.get("fp16", {}).get("enabled", False) else "float32"

    @property
    def gradient_dtype(self) -> str:
        """Dtype in which the gradients of the micro-batches are added up: "fp32" unless the JSON says otherwise."""
        return str(self.deepspeed.get("data_types", {}).get("grad_accum_dtype", "fp32"))

    @property
    def communication_dtype(self) -> str:
        """Dtype in which gradients travel: that in which they are added up unless the JSON says otherwise."""
        return str(self.deepspeed.get("communication_data_type", self.gradient_dtype))

    @property
    def gradient_clipping(self) -> float:
        """Largest gradient norm; 0 = no clipping."""
        return float(self.deepspeed.get("gradient_clipping", DEFAULT_GRADIENT_CLIPPING))

    @property
    def corrupted_lengths(self) -> CorruptedLengths:
        """Of an encoder-decoder: tokens of a row of each of the two, and how many sentinels a document may need."""
        return corrupted_lengths(self.phase.sequence_length, self.data.max_documents_per_row)

    @property
    def row_length(self) -> int:
        """Tokens of the longest rows that the model reads; those of an encoder-decoder are its encoder's."""
        return self.corrupted_lengths.encoder if self.model.num_decoder_layers else self.phase.sequence_length

    def compiled_on(self, device: str) -> bool:
        """Whether layers are to be compiled on "cuda" or "cpu". "auto": on GPUs, but not at ZeRO-3, whose hooks cut
        every layer to pieces, nor in fine-tuning, whose micro-batches have as many rows as texts fill."""
        if self.phase.compile != "auto":
            return bool(self.phase.compile)  # "cuda_graphs" too
        return device == "cuda" and self.zero_stage < 3 and self.finetune.tasks is None

    def to_dict(self) -> dict[str, Any]:
        """Return the whole JSON again with every default resolved; `parse_config` of it gives an equal Config."""
        blocks = {name: dataclasses.asdict(getattr(self, name)) for name in BLOCKS}
        return {**copy.deepcopy(dict(self.deepspeed)), "neomoba": blocks}

    def plan(self, world_size: int) -> BatchPlan:
        """Return the batch arithmetic for `world_size` ranks. Raises ConfigError when it does not close."""
        return plan_batch(self.phase, self.parallel, self.deepspeed, self.source, world_size)


BLOCKS: Final[Mapping[str, type]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "phase": PhaseConfig,
    "finetune": FinetuneConfig,
    "distill": DistillConfig,
    "checkpoint": CheckpointConfig,
    "health": HealthConfig,
    "log": LogConfig,
}
