"""Rules between keys that concern encoder-decoders; see rules.py."""

from collections.abc import Iterator
from typing import Final

from neomoba_dist.config.attention import is_list
from neomoba_dist.config.root import Config

_DECODER: Final = "neomoba.model.num_decoder_layers"


def encoder_decoder(config: Config) -> Iterator[str]:
    """Refuse half an encoder-decoder, and what one does not run on or with."""
    model = config.model
    if model.objective != "span_corruption":
        if model.num_decoder_layers:
            yield (
                f"{_DECODER} {model.num_decoder_layers} makes an encoder-decoder, which neomoba.model.objective "
                f"{model.objective} does not train; set objective to span_corruption, or num_decoder_layers to 0"
            )
        return
    if not model.num_decoder_layers:
        yield (
            "neomoba.model.objective span_corruption trains an encoder-decoder; set num_decoder_layers, for example to "
            f"{model.num_hidden_layers}"
        )
    elif not is_list(model.attention) and model.hybrid_layer_count > model.num_decoder_layers:
        yield (
            f"neomoba.model.hybrid_layer_count {model.hybrid_layer_count} is larger than num_decoder_layers "
            f"{model.num_decoder_layers}; set it to {model.num_decoder_layers} or less"
        )
    for key, value, plain in _unusual(config):
        if value != plain:
            yield (
                f"neomoba.{key} {value} does not work with an encoder-decoder (neomoba.model.objective "
                f"span_corruption); set it to {'null' if plain is None else plain}"
            )
    yield from _sequence_parallel(config)


def _unusual(config: Config) -> Iterator[tuple[str, object, object]]:
    """(key, its value, the only one that works)."""
    yield "parallel.pipeline_model_parallel_size", config.parallel.pipeline_model_parallel_size, 1
    yield "parallel.context_parallel_size", config.parallel.context_parallel_size, 1
    yield "model.num_experts", config.model.num_experts, 0
    yield "model.embedding_norm", config.model.embedding_norm, False
    yield "model.prediction_head", config.model.prediction_head, False
    yield "model.sliding_rope_theta", config.model.sliding_rope_theta, None
    yield "data.align", config.data.align, 1
    yield "data.token_dropout", config.data.token_dropout, 0
    yield "finetune.tasks", config.finetune.tasks, None
    yield "distill.teacher", config.distill.teacher, None


def _sequence_parallel(config: Config) -> Iterator[str]:
    """Refuse rows of the encoder or decoder that do not divide over the tensor-parallel ranks."""
    tp, micro = config.parallel.tensor_model_parallel_size, config.micro_batch_size
    lengths = config.corrupted_lengths
    if config.parallel.sequence_parallel and any(micro * length % tp for length in (lengths.encoder, lengths.decoder)):
        yield (
            f"neomoba.parallel.sequence_parallel cannot divide rows of {lengths.encoder} tokens of the encoder and "
            f"{lengths.decoder} of the decoder over tensor_model_parallel_size {tp}; set "
            f"train_micro_batch_size_per_gpu to {tp}"
        )
