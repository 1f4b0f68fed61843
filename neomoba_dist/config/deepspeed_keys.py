"""DeepSpeed's configuration keys (0.19.8) as data: what is accepted, and what is refused with the reason.

DeepSpeed accepts an unknown key silently (a typo in "zero_optimization" trains at stage 0), so every key is checked
here, without importing deepspeed. tests/unit/config/test_deepspeed_keys.py compares this table with the installed
version.
"""

from typing import Annotated, Final, Literal

from neomoba_dist.config.types import (
    LARGEST,
    Block,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Ranks,
    Refused,
    Size,
)

_OWN_CHECKPOINT = Refused("checkpoints are this program's own format; see neomoba.checkpoint")
_LOG = Refused("set neomoba.log.tensorboard or neomoba.log.wandb_project instead")
_NVME = Refused("offload to NVMe is not supported; use device cpu")
_FLOAT32_MASTER = Refused("master weights and optimizer moments are always float32")
_QUANTIZED = Refused("quantized communication changes the result; losses would differ between layouts")
_REMOVED = Refused("DeepSpeed 0.19 removed it; delete the key")
_REPLACED_BY_OFFLOAD = Refused("deprecated; use zero_optimization.offload_optimizer or zero_optimization.offload_param")
_LEAF = Refused("leaf modules of ZeRO stage 3 do not gather the weights of this model's layers")
_NO_EFFECT = Refused("it has no effect with ZeRO; delete the key")


def _renamed(name: str) -> Refused:
    return Refused(f"write it as {name}")


_OFFLOAD_OPTIMIZER: Final[Block] = {
    "device": Literal["none", "cpu"],
    "pin_memory": bool,
    "nvme_path": _NVME,
    "buffer_count": _NVME,
    "pipeline_read": _NVME,
    "pipeline_write": _NVME,
    "fast_init": _NVME,
    "ratio": Refused("partial offload needs DeepSpeed's own CPU optimizer; the optimizer here is torch's AdamW"),
    "super_offload": Refused("it needs DeepSpeed's own CPU optimizer; the optimizer here is torch's AdamW"),
    "cpuadam_cores_perc": Refused("it belongs to super_offload, which is not supported"),
}

_OFFLOAD_PARAM: Final[Block] = {
    "device": Literal["none", "cpu"],
    "pin_memory": bool,
    "nvme_path": _NVME,
    "buffer_count": _NVME,
    "buffer_size": _NVME,
    "max_in_cpu": _NVME,
}

_ZERO: Final[Block] = {
    "stage": Literal[0, 1, 2, 3],
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": PositiveInt,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": NonNegativeInt,
    "overlap_comm": bool | None,
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "sub_group_size": NonNegativeInt,
    "stage3_prefetch_bucket_size": NonNegativeInt,
    "stage3_param_persistence_threshold": NonNegativeInt,
    "stage3_model_persistence_threshold": NonNegativeInt,
    "stage3_max_live_parameters": NonNegativeInt,
    "stage3_max_reuse_distance": NonNegativeInt,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "ignore_unused_parameters": bool,
    "parameter_alignment": bool,
    "zero_hpz_partition_size": Ranks,
    "memory_efficient_linear": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "leaf_module": _LEAF,
    "stage3_module_granularity_threshold": _LEAF,
    "round_robin_gradients": Refused("DeepSpeed then hands out the wrong weights for checkpoints"),
    "compute_grad_norm": Refused("the gradient norm is part of every step's log"),
    "zenflow": Refused("ZenFlow changes the optimizer's result"),
    "zero_quantized_weights": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_gradients": _QUANTIZED,
    "save_muon_momentum_buffer_in_memory": Refused("DeepSpeed's own Muon is not used; see neomoba.phase.optimizer"),
    "load_from_fp32_weights": _OWN_CHECKPOINT,
    "elastic_checkpoint": _OWN_CHECKPOINT,
    "pipeline_loading_checkpoint": _OWN_CHECKPOINT,
    "stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINT,
    "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINT,
    "gather_16bit_weights_on_model_save": _OWN_CHECKPOINT,
    "legacy_stage1": _NO_EFFECT,
    "cpu_offload": _REPLACED_BY_OFFLOAD,
    "cpu_offload_param": _REPLACED_BY_OFFLOAD,
    "cpu_offload_use_pin_memory": _REPLACED_BY_OFFLOAD,
    "prefetch_bucket_size": _renamed("zero_optimization.stage3_prefetch_bucket_size"),
    "param_persistence_threshold": _renamed("zero_optimization.stage3_param_persistence_threshold"),
    "model_persistence_threshold": _renamed("zero_optimization.stage3_model_persistence_threshold"),
    "max_live_parameters": _renamed("zero_optimization.stage3_max_live_parameters"),
    "max_reuse_distance": _renamed("zero_optimization.stage3_max_reuse_distance"),
    "module_granularity_threshold": _LEAF,
    "use_all_reduce_for_fetch_params": _renamed("zero_optimization.stage3_use_all_reduce_for_fetch_params"),
    "allgather_sequential": _renamed("zero_optimization.stage3_allgather_sequential"),
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
}

_BF16: Final[Block] = {
    "enabled": bool,
    "check_grad_overflow": bool,
    "immediate_grad_update": Refused("it belongs to DeepSpeed's BF16_Optimizer, which is not used"),
    "bf16_master_weights_and_grads": _FLOAT32_MASTER,
    "bf16_optimizer_states": _FLOAT32_MASTER,
}

_FP16: Final[Block] = {
    "enabled": bool,
    "loss_scale": NonNegativeFloat,
    "initial_scale_power": NonNegativeInt,
    "loss_scale_window": PositiveInt,
    "hysteresis": PositiveInt,
    "consecutive_hysteresis": bool,
    "min_loss_scale": PositiveInt,
    "auto_cast": Refused("the inputs are token ids; there is nothing to cast"),
    "fp16_master_weights_and_grads": _FLOAT32_MASTER,
}

_DATA_TYPES: Final[Block] = {
    "grad_accum_dtype": Literal["fp32", "bf16", "fp16"],
    "param_dtype": Refused("set bf16.enabled or fp16.enabled instead"),
    "buffer_dtype": Refused("the model chooses the dtype of its buffers"),
    "keep_in_fp32_modules": Refused("the model chooses the dtype of its buffers"),
}

_ACCEPTED: Final[Block] = {
    "train_micro_batch_size_per_gpu": Size,
    "gradient_accumulation_steps": PositiveInt,
    "train_batch_size": PositiveInt,
    "gradient_clipping": NonNegativeFloat,
    "zero_optimization": _ZERO,
    "bf16": _BF16,
    "fp16": _FP16,
    "data_types": _DATA_TYPES,
    "communication_data_type": Literal["fp32", "bf16", "fp16"],
    "steps_per_print": PositiveInt,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list[str], "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": NonNegativeFloat,
        "profile_step": PositiveInt,
        "module_depth": Annotated[int, Range(ge=-1, le=LARGEST)],
        "top_modules": PositiveInt,
        "detailed": bool,
        "output_file": str | None,
    },
}

_REFUSED: Final[Block] = {
    "optimizer": Refused(
        "set neomoba.phase.optimizer (adamw or muon), learning_rate, weight_decay, adam_beta1, adam_beta2, adam_eps"
    ),
    "scheduler": Refused("set neomoba.phase.schedule, warmup_steps, decay_steps, min_learning_rate_ratio instead"),
    "activation_checkpointing": Refused("set neomoba.phase.recompute and neomoba.phase.recompute_every instead"),
    "compile": Refused("set neomoba.phase.compile instead"),
    "tensorboard": _LOG,
    "wandb": _LOG,
    "csv_monitor": _LOG,
    "comet": _LOG,
    "checkpoint": _OWN_CHECKPOINT,
    "datastates_ckpt": _OWN_CHECKPOINT,
    "tensor_parallel": Refused("set neomoba.parallel.tensor_model_parallel_size instead"),
    "expert_parallel": Refused("set neomoba.parallel.expert_model_parallel_size instead"),
    "sequence_parallel_size": Refused("set neomoba.parallel.context_parallel_size instead"),
    "data_parallel_size": Refused("it is the number of ranks divided by the other axes of neomoba.parallel"),
    "seq_parallel_communication_data_type": Refused("set communication_data_type instead"),
    "use_data_before_expert_parallelism": Refused("the order of the ranks is fixed; see neomoba.parallel"),
    "pipeline": Refused(
        "set neomoba.parallel.pipeline_model_parallel_size and neomoba.phase.recompute instead (pipe_partitioned, "
        "grad_partitioned and use_reentrant are always false)"
    ),
    "data_efficiency": Refused("set the keys of neomoba.data and neomoba.phase instead"),
    "dataloader_drop_last": Refused("rows are packed by this program's own data loader; see neomoba.data"),
    "vocabulary_size": Refused("set neomoba.model.vocab_size instead"),
    "managed_gradient_accumulation": Refused("accumulation follows from neomoba.phase.tokens_per_update"),
    "gradient_allreduce_op": Refused("gradients are always averaged; the loss counts on it"),
    "prescale_gradients": _NO_EFFECT,
    "gradient_predivide_factor": _NO_EFFECT,
    "disable_allgather": _NO_EFFECT,
    "allgather_size": Refused("set zero_optimization.allgather_bucket_size instead"),
    "zero_allow_untested_optimizer": _NO_EFFECT,
    "zero_force_ds_cpu_optimizer": Refused("the program sets it"),
    "torch_autocast": Refused("set bf16.enabled instead"),
    "bfloat16": Refused("write it as bf16"),
    "aio": _NVME,
    "autotuning": Refused("it starts runs of its own; use --dry_run and set the sizes by hand"),
    "hybrid_engine": Refused("it is for inference within training"),
    "weight_quantization": Refused("it is for inference"),
    "amp": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "sparse_attention": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": Refused(
        "DeepSpeed 0.19 removed it; the batch follows from neomoba.phase.tokens_per_update for any number of ranks"
    ),
    "graph_harvesting": _REMOVED,
    "curriculum_learning": Refused("DeepSpeed 0.19 removed it; write one phase per length (neomoba.phase)"),
    "progressive_layer_drop": _REMOVED,
}

DEEPSPEED_KEYS: Final[Block] = {**_ACCEPTED, **_REFUSED}
