"""Rules of `neomoba.phase.compile: cuda_graphs`: what train/graphs.py can record."""

from collections.abc import Iterator

from neomoba_dist.config.root import Config


def cuda_graphs(config: Config) -> Iterator[str]:
    """Refuse graphs of what the host decides on while it runs, and gradients that stay in a graph's memory."""
    if not config.phase.cuda_graphs:
        return
    key, off = "neomoba.phase.compile cuda_graphs", "or compile to auto"
    parallel, model = config.parallel, config.model
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                 "expert_model_parallel_size"):  # fmt: skip
        if (size := getattr(parallel, name)) > 1:
            yield f"{key} records whole layers, and neomoba.parallel.{name} {size} cuts them; set it to 1, {off}"
    if config.zero_stage == 3:
        yield (
            f"{key} records layers whose weights stay where they are, which those of zero_optimization.stage 3 do not; "
            f"set the stage to 1 or 2, {off}"
        )
    if config.dtype_name == "float32" or config.gradient_dtype != "fp32":
        mend = "set bf16.enabled to true" if config.dtype_name == "float32" else "delete data_types.grad_accum_dtype"
        yield (
            f"{key} writes each micro-batch's gradients where the last one's were, so their sum must lie elsewhere: in "
            f"float32, beside half-precision ones; {mend}, {off}"
        )
    if model.num_decoder_layers or config.finetune.tasks is not None or config.distill.teacher is not None:
        yield (
            f"{key} records the pretraining of one stack of layers, not encoder-decoders, fine-tuning or distillation; "
            "set it to auto"
        )
    if model.num_experts and model.moe_overflow == "reroute" and model.moe_capacity_factor is not None:
        yield (
            f"{key} records layers without loops on the host, which neomoba.model.moe_overflow reroute has; set it to "
            f"drop, {off}"
        )
