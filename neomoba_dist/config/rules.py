"""Rules between keys: combinations that no engine can run, or that would run and be wrong. Checked once, at load.

Each rule yields the text of what is broken; the first one is raised. The reasons were measured with DeepSpeed 0.19.8.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final

from neomoba_dist.config.attention import attention_problems
from neomoba_dist.config.batch import nearest_multiples
from neomoba_dist.config.context import FULL_STRATEGIES, MOBA_STRATEGIES, possible, ulysses_ranks
from neomoba_dist.config.cuda_graphs import cuda_graphs
from neomoba_dist.config.distill import distillation
from neomoba_dist.config.encoder_decoder import encoder_decoder
from neomoba_dist.config.errors import ConfigError
from neomoba_dist.config.expert_rules import expert_engine, experts
from neomoba_dist.config.finetune import finetuning
from neomoba_dist.config.root import Config
from neomoba_dist.config.schema import ModelConfig
from neomoba_dist.config.segments import segments
from neomoba_dist.config.sources import source_problems

_TP: Final = "neomoba.parallel.tensor_model_parallel_size"
_PP: Final = "neomoba.parallel.pipeline_model_parallel_size"
_CP: Final = "neomoba.parallel.context_parallel_size"


def check_rules(config: Config) -> None:
    """Raise ConfigError with the first broken rule of `config`."""
    for rule in RULES:
        for problem in rule(config):
            raise ConfigError(f"{config.source}: {problem}")


def zero_stage(config: Config) -> Iterator[str]:
    """Refuse ZeRO stages that are wrong or that the pipeline engine asserts against."""
    stage, pp = config.zero_stage, config.parallel.pipeline_model_parallel_size
    if stage == 0:
        yield (
            "zero_optimization.stage is 0, which DeepSpeed gets wrong (bf16 makes a spurious first step, float32 clips "
            "by a wrong norm); set zero_optimization.stage to 1"
        )
    if stage > 1 and pp > 1:
        yield (
            f"zero_optimization.stage {stage} cannot be combined with {_PP} {pp} (DeepSpeed's pipeline "
            "engine works at stage 1 only); set zero_optimization.stage to 1"
        )
    offload = config.deepspeed["zero_optimization"].get("offload_param", {})
    if stage < 3 and offload.get("device", "none") != "none":
        yield f"zero_optimization.offload_param works at stage 3 only (stage is {stage}); set its device to none"
    tp = config.parallel.tensor_model_parallel_size
    if config.deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1) > 1 and (stage < 3 or tp > 1):
        yield (
            f"zero_optimization.zero_hpz_partition_size works at stage 3 with {_TP} 1 only (not {stage} and {tp}); "
            "DeepSpeed groups neighbouring ranks, which would mix the shards of tensor parallelism; set it to 1"
        )


def precision(config: Config) -> Iterator[str]:
    """Refuse two compute dtypes at once, and sums of gradients in a dtype that is neither theirs nor float32."""
    bf16, fp16 = (config.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16"))
    if bf16 and fp16:
        yield "bf16.enabled and fp16.enabled are both true; set one of them to false"
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[config.dtype_name]
    if config.gradient_dtype not in ("fp32", short):
        yield (
            f"data_types.grad_accum_dtype is {config.gradient_dtype} but the model computes in {short}; delete the key"
        )


def model_shape(config: Config) -> Iterator[str]:
    """Refuse shapes that do not make a network."""
    model = config.model
    heads, groups, layers = model.num_attention_heads, model.num_key_value_heads, model.num_hidden_layers
    if heads % groups:
        divisors = [size for size in range(1, heads + 1) if heads % size == 0]
        yield (
            f"neomoba.model.num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}; "
            f"set num_key_value_heads to one of {divisors}"
        )
    if model.head_dim is None:
        yield (
            f"neomoba.model.hidden_size {model.hidden_size} is not a multiple of num_attention_heads {heads}; "
            f"set it to {nearest_multiples(model.hidden_size, heads)}, or give neomoba.model.head_dim"
        )
    elif model.head_dim % 2 and model.position_embedding == "rope":
        yield f"neomoba.model.head_dim {model.head_dim} is odd; rotary embedding turns pairs, set it to an even number"
    if model.hybrid_layer_count > layers:
        yield (
            f"neomoba.model.hybrid_layer_count {model.hybrid_layer_count} is larger than num_hidden_layers {layers}; "
            f"set it to {layers} or less"
        )


def attention(config: Config) -> Iterator[str]:
    """Refuse kinds of attention that do not fill the layers, and settings that no layer reads."""
    model = config.model
    layers = (model.num_hidden_layers, model.hybrid_layer_count, model.num_decoder_layers)
    for problem in attention_problems(model.attention, *layers):
        yield f"neomoba.model.attention {problem}"
    if model.global_tokens and "sliding_window" not in model.layer_attentions:
        yield (
            f"neomoba.model.global_tokens {model.global_tokens} belongs to sliding-window layers, of which "
            f'neomoba.model.attention "{model.attention}" makes none; set global_tokens to 0'
        )
    if model.sliding_rope_theta is not None and "sliding_window" not in model.layer_attentions:
        yield (
            f"neomoba.model.sliding_rope_theta {model.sliding_rope_theta:g} belongs to sliding-window layers, of which "
            f'neomoba.model.attention "{model.attention}" makes none; set sliding_rope_theta to null'
        )
    tp = config.parallel.tensor_model_parallel_size
    if model.moba_gate == "kv_group" and model.num_key_value_heads < tp:
        yield (
            f"neomoba.model.moba_gate kv_group adds up the queries of a KV head, but tensor_model_parallel_size {tp} "
            f"spreads those of {model.num_key_value_heads} KV heads over several ranks; set moba_gate to per_head, or "
            f"tensor_model_parallel_size to {model.num_key_value_heads} or less"
        )
    if not model.causal and model.key_conv_width % 2 == 0 and model.key_conv_width:
        yield (
            f"neomoba.model.key_conv_width {model.key_conv_width} has no middle, and with objective "
            f"{model.objective} the convolution is centred on its key; set it to {model.key_conv_width + 1}"
        )


def positions(config: Config) -> Iterator[str]:
    """Refuse position schemes that are not defined for the model, and settings that the scheme does not read."""
    model, scaling = config.model, config.model.rope_scaling_type
    if model.position_embedding == "sinusoidal" and model.hidden_size % 2:
        yield (
            f"neomoba.model.hidden_size {model.hidden_size} is odd, and sinusoidal positions come in pairs of sine and "
            f"cosine; set hidden_size to {nearest_multiples(model.hidden_size, 2)}"
        )
    if scaling is not None and model.position_embedding != "rope":
        yield (
            f"neomoba.model.rope_scaling_type {scaling} needs rotary positions, but position_embedding is "
            f"{model.position_embedding}; set rope_scaling_type to null"
        )
    if model.sliding_rope_theta is not None and model.position_embedding != "rope":
        yield (
            f"neomoba.model.sliding_rope_theta {model.sliding_rope_theta:g} needs rotary positions, but "
            f"position_embedding is {model.position_embedding}; set sliding_rope_theta to null"
        )
    if scaling is None and model.rope_scaling_factor != 1:
        yield (
            f"neomoba.model.rope_scaling_factor {model.rope_scaling_factor:g} has no effect without rope_scaling_type; "
            "set rope_scaling_type to yarn, or rope_scaling_factor to 1"
        )
    if scaling == "ntk" and model.head_dim == 2:
        yield "neomoba.model.rope_scaling_type ntk is not defined for head_dim 2; set rope_scaling_type to linear"
    if scaling == "yarn" and model.original_max_position_embeddings is None:
        yield (
            "neomoba.model.rope_scaling_type yarn needs original_max_position_embeddings; set it to the longest "
            "sequence before the scaling"
        )


def tensor_parallel(config: Config) -> Iterator[str]:
    """Refuse sizes that do not divide over the tensor-parallel ranks."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    for problem in _not_divisible(model, tp):
        smaller = range(1, min(tp, model.num_attention_heads + 1))
        works = max(size for size in smaller if not any(_not_divisible(model, size)))
        yield f"neomoba.model.{problem} {_TP} {tp}; set {_TP} to {works}"
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield f"neomoba.parallel.sequence_parallel needs tensor parallelism; set it to false, or {_TP} to 2 or more"
    positions = config.micro_batch_size * config.phase.sequence_length
    if positions % tp and config.parallel.context_parallel_size == 1:  # a context-parallel batch is padded anyway
        yield (
            f"train_micro_batch_size_per_gpu {config.micro_batch_size} x neomoba.phase.sequence_length "
            f"{config.phase.sequence_length} is not a multiple of {_TP} {tp}, which sequence_parallel needs; "
            f"set sequence_length to {nearest_multiples(config.phase.sequence_length, tp)}"
        )


def context_parallel(config: Config) -> Iterator[str]:
    """Refuse exchange strategies that the KV heads do not allow, and attention that no strategy serves."""
    model, parallel, cp = config.model, config.parallel, config.parallel.context_parallel_size
    if cp == 1:
        return
    heads = max(1, model.num_key_value_heads // parallel.tensor_model_parallel_size)
    for kind, names in (("moba", MOBA_STRATEGIES), ("full", FULL_STRATEGIES)):
        key = f"context_parallel_{kind}"
        if not possible(name := getattr(parallel, key), cp, heads):
            usable = ", ".join(["auto", *(n for n in names if possible(n, cp, heads))])
            yield (
                f"neomoba.parallel.{key} {name} cannot divide {heads} KV heads per tensor-parallel rank over {_CP} "
                f"{cp}; set it to one of {usable}"
            )
    if model.moba_pooling != "mean" and parallel.context_parallel_moba.endswith("route_queries"):
        yield (
            f"neomoba.model.moba_pooling {model.moba_pooling} is not put together from the parts of a block on several "
            f"ranks, which context_parallel_moba {parallel.context_parallel_moba} needs; set context_parallel_moba to "
            "auto, or moba_pooling to mean"
        )
    if model.position_embedding in ("alibi", "t5_relative"):
        yield (
            f"neomoba.model.position_embedding {model.position_embedding} biases the scores, which {_CP} {cp} does not "
            "exchange; set position_embedding to rope"
        )
    if model.global_tokens and "sliding_window" in model.layer_attentions and not possible("ulysses", cp, heads):
        yield (
            f"neomoba.model.global_tokens {model.global_tokens} needs a {_CP} that divides the {heads} KV heads of a "
            f"tensor-parallel rank, not {cp}; set global_tokens to 0, or {_CP} to {ulysses_ranks(cp, heads)}"
        )


def pipeline(config: Config) -> Iterator[str]:
    """Refuse more pipeline stages than layers, and timers that DeepSpeed's pipeline engine starts twice."""
    layers, pp = config.model.num_hidden_layers, config.parallel.pipeline_model_parallel_size
    if pp > layers:
        yield (f"{_PP} {pp} is larger than neomoba.model.num_hidden_layers {layers}; set it to {layers} or less")
    timed = {
        "wall_clock_breakdown": config.deepspeed.get("wall_clock_breakdown", False),
        "flops_profiler.enabled": config.deepspeed.get("flops_profiler", {}).get("enabled", False),
    }
    for key, is_on in timed.items():
        if is_on and pp > 1:
            yield f"{key} does not work in DeepSpeed's pipeline engine; set it to false, or {_PP} to 1"


def phase_lengths(config: Config) -> Iterator[str]:
    """Refuse positions beyond the model's and schedules longer than the phase."""
    phase, longest = config.phase, config.model.max_position_embeddings
    if phase.sequence_length > longest:
        yield (
            f"neomoba.phase.sequence_length {phase.sequence_length} is larger than "
            f"neomoba.model.max_position_embeddings {longest}; set max_position_embeddings to {phase.sequence_length}"
        )
    if phase.warmup_steps > phase.steps:
        yield (
            f"neomoba.phase.warmup_steps {phase.warmup_steps} is larger than neomoba.phase.steps {phase.steps}; "
            f"set warmup_steps to {phase.steps} or less"
        )
    if phase.decay_steps is not None and phase.warmup_steps + phase.decay_steps > phase.steps:
        yield (
            f"neomoba.phase.warmup_steps {phase.warmup_steps} + decay_steps {phase.decay_steps} is larger than steps "
            f"{phase.steps}; set decay_steps to {max(phase.steps - phase.warmup_steps, 0)} or less"
        )


def batch(config: Config) -> Iterator[str]:
    """Refuse a batch that closes for no number of ranks, and a stated batch size that contradicts it."""
    phase, micro = config.phase, config.micro_batch_size
    step = micro * phase.sequence_length
    if phase.tokens_per_update % step:
        yield (
            f"neomoba.phase.tokens_per_update {phase.tokens_per_update} is not a multiple of "
            f"train_micro_batch_size_per_gpu {micro} x sequence_length {phase.sequence_length}; "
            f"set it to {nearest_multiples(phase.tokens_per_update, step)}"
        )
    rows = phase.tokens_per_update // phase.sequence_length
    stated = config.deepspeed.get("train_batch_size", rows)
    if stated != rows:
        yield (
            f"train_batch_size is {stated}, but neomoba.phase.tokens_per_update {phase.tokens_per_update} / "
            f"sequence_length {phase.sequence_length} makes {rows} rows; delete the key, it is derived"
        )


def data(config: Config) -> Iterator[str]:
    """Refuse sources that name nothing, and documents that would start between rows."""
    for problem in source_problems(config.data.train):
        yield f"neomoba.data.train {problem}"
    align, length = config.data.align, config.phase.sequence_length
    if length % align:
        small = [size for size in range(1, math.isqrt(length) + 1) if length % size == 0]
        divisors = sorted({*small, *(length // size for size in small)})
        nearest = min(divisors, key=lambda size: abs(size - align))
        yield (
            f"neomoba.data.align {align} does not divide neomoba.phase.sequence_length {length}; set align to {nearest}"
        )


def texts(config: Config) -> Iterator[str]:
    """Refuse empty names."""
    for key, text in (
        ("phase.name", config.phase.name),
        ("data.validation", config.data.validation),
        ("data.cache", config.data.cache),
        ("log.wandb_project", config.log.wandb_project),
    ):
        if text is not None and not text.strip():
            yield f"neomoba.{key} is empty; give it a value or delete the key"


def _not_divisible(model: ModelConfig, tp: int) -> Iterator[str]:
    """Yield what does not divide over `tp` ranks; key/value heads may also be copied to several ranks."""
    if model.num_attention_heads % tp:
        yield f"num_attention_heads {model.num_attention_heads} is not a multiple of"
    if model.num_key_value_heads % tp and tp % model.num_key_value_heads:
        yield f"num_key_value_heads {model.num_key_value_heads} neither divides nor is a multiple of"
    if model.intermediate_size % tp:
        yield f"intermediate_size {model.intermediate_size} is not a multiple of"


def checkpoints(config: Config) -> Iterator[str]:
    """Refuse checkpoints to keep that are never written."""
    settings = config.checkpoint
    if settings.keep_every % settings.save_every:
        yield (
            f"neomoba.checkpoint.keep_every {settings.keep_every} is not a multiple of save_every "
            f"{settings.save_every}; set it to {nearest_multiples(settings.keep_every, settings.save_every)}, or to 0"
        )


RULES: Final[tuple[Callable[[Config], Iterator[str]], ...]] = (
    zero_stage,
    precision,
    model_shape,
    encoder_decoder,
    attention,
    positions,
    segments,
    tensor_parallel,
    context_parallel,
    pipeline,
    experts,
    expert_engine,
    phase_lengths,
    batch,
    data,
    texts,
    checkpoints,
    finetuning,
    distillation,
    cuda_graphs,
)
