"""The keys of the "neomoba" block as frozen dataclasses: names, types, ranges and defaults.

ds_configs/README.md explains each key. A field without a default must be given in the JSON. The annotations are what
check.py holds every value against.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from neomoba_dist.config.attention import expand_attention, list_attention
from neomoba_dist.config.sources import SourceEntry, parse_sources
from neomoba_dist.config.text_tasks import TEXT_TASKS, HeadConfig, names_of
from neomoba_dist.config.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalParts,
    OptionalSize,
    Parts,
    PositiveFloat,
    PositiveInt,
    Range,
    Ranks,
    Size,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, independent of how it is cut over ranks. Sizes count elements, `rope_theta` is the RoPE base."""

    objective: Literal["mlm", "clm", "span_corruption"] = "mlm"
    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Parts = 28
    num_decoder_layers: OptionalParts = 0
    num_attention_heads: Parts = 12
    num_key_value_heads: Parts = 4
    head_dim: Size | None = None
    intermediate_size: Size = 3072
    mlp_activation: Literal["swiglu", "geglu", "relu", "gelu", "silu"] = "swiglu"
    max_position_embeddings: Size = 32768
    norm: Literal["rmsnorm", "layernorm", "layernorm_no_bias"] = "rmsnorm"
    norm_placement: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    qk_norm: bool = False
    prediction_head: bool = False
    tie_word_embeddings: bool = False
    position_embedding: Literal["rope", "learned", "sinusoidal", "alibi", "t5_relative", "none"] = "rope"
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_type: Literal["linear", "ntk", "yarn"] | None = None
    rope_scaling_factor: Annotated[float, Range(ge=1)] = 1.0
    original_max_position_embeddings: Size | None = None
    attention: str = "moba"
    hybrid_layer_count: OptionalParts = 3
    moba_block_size: Size = 512
    moba_top_k: Size = 3
    moba_gate: Literal["per_head", "kv_group"] = "per_head"
    moba_pooling: Literal["mean", "max", "minmax", "representative"] = "mean"
    sliding_window: Size = 512
    sliding_rope_theta: PositiveFloat | None = None
    global_tokens: OptionalSize = 0
    key_conv_width: OptionalParts = 0
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    type_vocab_size: Literal[0, 2] = 0
    next_sentence_prediction: bool = False
    initializer_range: PositiveFloat = 0.02
    num_experts: OptionalParts = 0
    num_experts_per_tok: Parts = 2
    moe_intermediate_size: Size | None = None
    num_shared_experts: OptionalParts = 0
    moe_layer_frequency: Parts = 1
    first_k_dense_replace: OptionalParts = 0
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    n_group: Parts = 1
    topk_group: Parts = 1
    router_bias_update_rate: NonNegativeFloat = 0.0
    router_aux_loss_coef: NonNegativeFloat = 0.001
    router_aux_loss_scope: Literal["row", "global"] = "row"
    router_z_loss_coef: NonNegativeFloat = 0.0
    router_jitter: Annotated[float, Range(ge=0, lt=1)] = 0.0
    moe_capacity_factor: PositiveFloat | None = None
    moe_overflow: Literal["drop", "pad", "reroute"] = "drop"

    def __post_init__(self) -> None:
        """Resolve `head_dim` and `moe_intermediate_size`, so that no reader has to know their defaults.

        `head_dim` stays None when the division leaves a rest.
        """
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.moe_intermediate_size is None and self.num_experts:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and earlier ones (`objective` "clm")."""
        return self.objective == "clm"

    @property
    def layer_attentions(self) -> tuple[str, ...]:
        """Kind of attention of every layer, first to last: "moba", "full" or "sliding_window"."""
        return expand_attention(
            self.attention, self.num_hidden_layers, self.hybrid_layer_count, self.num_decoder_layers
        )

    @property
    def num_layers(self) -> int:
        """Layers of the whole model; those of a decoder follow those of its encoder, and are numbered on."""
        return self.num_hidden_layers + self.num_decoder_layers

    @property
    def encoder(self) -> Self:
        """The encoder of an encoder-decoder, as a model of its own."""
        kinds = self.layer_attentions[: self.num_hidden_layers]
        return replace(self, objective="mlm", num_decoder_layers=0, attention=list_attention(kinds))

    @property
    def decoder(self) -> Self:
        """The decoder of an encoder-decoder, but for its cross attention, as a model of its own."""
        kinds = self.layer_attentions[self.num_hidden_layers :]
        return replace(
            self,
            objective="clm",
            num_hidden_layers=self.num_decoder_layers,
            num_decoder_layers=0,
            attention=list_attention(kinds),
        )

    def has_attention_norm(self, layer: int) -> bool:
        """Whether a layer has a norm of its own for attention: not the first one where it would norm a second time."""
        return layer > 0 or not self.embedding_norm or self.norm_placement == "post"

    @property
    def mlp_matrices(self) -> int:
        """Matrices of a dense feed-forward layer: the gated ones have one more."""
        return 3 if self.mlp_activation in ("swiglu", "geglu") else 2

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward part is a mixture of experts (as in DeepSeek's models)."""
        layers = range(self.first_k_dense_replace, self.num_hidden_layers)
        return tuple(i for i in layers if i % self.moe_layer_frequency == 0) if self.num_experts else ()


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes in ranks; what is left of the world is data parallel.

    context_parallel_split: how tokens are dealt to the context-parallel ranks; context_parallel_moba and
    context_parallel_full: what MoBA layers and full layers then exchange.
    """

    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1
    context_parallel_size: Ranks = 1
    context_parallel_split: Literal["block_cyclic", "zigzag", "contiguous"] = "block_cyclic"
    context_parallel_moba: Literal[
        "auto", "ulysses", "allgather_kv", "route_queries", "ulysses+allgather_kv", "ulysses+route_queries"
    ] = "auto"
    context_parallel_full: Literal[
        "auto", "ulysses", "allgather_kv", "ring", "ulysses+allgather_kv", "ulysses+ring"
    ] = "auto"
    expert_model_parallel_size: Ranks = 1
    expert_tensor_parallel_size: Ranks | None = None
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards lie and how rows become training examples."""

    train: str
    validation: str | None = None
    mlm_probability: Annotated[float, Range(gt=0, lt=1)] = 0.2
    mlm_scheme: Literal["80/10/10", "all"] = "80/10/10"
    mlm_whole_word: bool = False
    token_dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    max_documents_per_row: Size = 128
    packing: Literal["best_fit", "concat", "whole"] = "best_fit"
    align: Size = 1
    shuffle_shards: PositiveInt | None = None
    cache: str | None = "runs/cache"
    prefetch: OptionalParts = 2
    on_corrupt: Literal["raise", "skip"] = "raise"
    check_every: PositiveInt = 100

    @property
    def sources(self) -> tuple[SourceEntry, ...]:
        """What `train` names: one corpus, or a mixture."""
        return parse_sources(self.train)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training phase: its length, batch, optimizer, schedule, attention schedule and memory settings."""

    name: str
    steps: PositiveInt
    sequence_length: Size
    tokens_per_update: PositiveInt
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat
    min_learning_rate_ratio: Fraction = 0.1
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: PositiveInt | None = None
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Range(ge=0, lt=1)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    full_attention_fraction: Fraction = 1.0
    full_attention_schedule: Literal["tail", "interleave"] = "tail"
    recompute: Literal["none", "full", "selective", "auto"] = "none"
    recompute_every: Parts = 1
    compile: Literal["auto", True, False, "cuda_graphs"] = "auto"
    allow_tf32: bool = True
    deterministic: bool = False
    seed: Annotated[int, Range(ge=0, lt=2**63)] = 1234

    @property
    def cuda_graphs(self) -> bool:
        """Whether layers are compiled and run by CUDA graphs."""
        return self.compile == "cuda_graphs"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning on whole texts (launch/finetune.py); with `tasks` null the run is one of pretraining.

    tasks, transfer: names, comma-separated (config/finetune.py). epochs: passes over the training set, to which the
    phase's steps are stretched. patience: validations without a better one until a run ends; 0: never. seeds: runs of
    each task, from phase.seed on. transfer: tasks that start from the weights of the mnli run.
    """

    tasks: str | None = None
    pooling: Literal["cls", "mean"] = "cls"
    epochs: PositiveFloat | None = None
    patience: NonNegativeInt = 0
    seeds: PositiveInt = 1
    transfer: str | None = None
    temperature: PositiveFloat = 0.05

    @property
    def head(self) -> HeadConfig | None:
        """The head of the (first) task; None in pretraining."""
        if self.tasks is None:
            return None
        return TEXT_TASKS[names_of(self.tasks)[0]].head(self.pooling, self.temperature)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student learns from a teacher (launch/distill.py); with `teacher` null there is none.

    temperature: of both distributions in the logit loss. The weights are those of the three losses (model/distill.py).
    """

    teacher: str | None = None
    temperature: PositiveFloat = 2.0
    logit_weight: NonNegativeFloat = 1.0
    hidden_weight: NonNegativeFloat = 0.0
    label_weight: NonNegativeFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a checkpoint is written, in steps, which ones are kept (0 = all), and how.

    keep_every, export_every: also in steps; 0 = never.
    """

    save_every: PositiveInt = 1000
    keep_last: NonNegativeInt = 0
    keep_every: NonNegativeInt = 0
    export_every: NonNegativeInt = 0
    async_save: bool = True
    on_save_failure: Literal["continue", "stop"] = "continue"


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a rank without a sign of life is given up, in seconds; which updates are skipped, and when that ends a run.

    max_skipped_steps: in a row. spike_sigma: standard deviations above the last 128 steps; 0 = no limit.
    """

    lost_after: PositiveFloat = 20.0
    max_skipped_steps: PositiveInt = 10
    spike_sigma: NonNegativeFloat = 6.0


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the run log goes besides metrics.jsonl, and how often the validation rows are run, in steps."""

    tensorboard: bool = True
    wandb_project: str | None = None
    validate_every: PositiveInt = 500
    validation_rows: Size = 64
