"""What `bench decoding` lets take turns: our decoder and that of transformers, with the same weights and keys."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neomoba_dist.checkpoint.hf import HuggingFaceReader
from neomoba_dist.checkpoint.hf_families import FAMILIES
from neomoba_dist.checkpoint.load import load_weights
from neomoba_dist.config import ModelConfig
from neomoba_dist.generate.decode import Decoder
from neomoba_dist.generate.stage import Stage, batch_of
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh


class OurDecoder:
    """One document, cached or, with `cached` False, as a whole pass over the text for each token."""

    def __init__(self, stage: Stage, room: int, decode: str = "full", cached: bool = True) -> None:
        self.decoder = Decoder(stage, [room], decode)
        self.cached = cached
        self.text: list[int] = []

    def fill(self, layer: int, k_TND: Tensor, v_TND: Tensor) -> None:
        """Take the keys and values of a first step, whose tokens no layer computes."""
        if layer == 0:
            self.decoder.cache.begin([len(k_TND)])
        self.decoder.cache.layers[layer].extend(k_TND, v_TND)

    def step(self, tokens: list[int]) -> Tensor:
        """Feed tokens; returns the logits [V] after the last one."""
        stage = self.decoder.stage
        self.text += tokens
        hidden = self.decoder.step([tokens]) if self.cached else stage.run(batch_of([self.text], self.decoder.device))
        assert hidden is not None  # one pipeline stage
        return stage.logits(hidden[-1:])[0, : stage.config.vocab_size]

    def num_bytes(self) -> int:
        """Of the cache."""
        return self.decoder.cache.num_bytes() if self.cached else 0


class TransformersDecoder:
    """The same by transformers. cache: DynamicCache, which `generate` takes by default, or StaticCache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache

    def fill(self, layer: int, k_TND: Tensor, v_TND: Tensor) -> None:
        """See OurDecoder."""
        self.cache.update(*(x.transpose(0, 1)[None].contiguous() for x in (k_TND, v_TND)), layer)

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """See OurDecoder."""
        ids = torch.tensor([tokens], device=self.model.device)
        with warnings.catch_warnings():  # 5.40 renames past_key_values
            warnings.simplefilter("ignore", FutureWarning)
            return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0, -1]

    def num_bytes(self) -> int:
        """Of the cache."""
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))


def random_stage(config: ModelConfig, dtype: torch.dtype, device: str) -> Stage:
    """A model with the weights of its seed."""
    return Stage.of(NeoBERT(config, Mesh.single(device), dtype=dtype).to(device))


def same_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> tuple[Stage, Any]:
    """Qwen3 of transformers with random weights, and ours with the same, read from the folder that it saves."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    described = FAMILIES["qwen3"].from_model(replace(config, attention="full"))
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**described)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        stage = random_stage(config, torch.float32, device)
        load_weights(HuggingFaceReader(Path(folder)), stage)
    return stage.to(dtype), theirs.to(device=device, dtype=dtype)


def in_context(
    config: ModelConfig, context: int, room: int, dtype: torch.dtype, device: str
) -> dict[str, OurDecoder | TransformersDecoder]:
    """By name everybody, with the keys and values of `context` random tokens in the cache."""
    from transformers import DynamicCache, StaticCache

    stage, theirs = same_weights(config, dtype, device)
    found: dict[str, OurDecoder | TransformersDecoder] = {
        "transformers, DynamicCache": TransformersDecoder(theirs, DynamicCache(config=theirs.config)),
        "transformers, StaticCache": TransformersDecoder(theirs, StaticCache(theirs.config, max_cache_len=room)),
        "ours, full attention": OurDecoder(stage, room, "full"),
        "ours, MoBA": OurDecoder(stage, room, "moba"),
    }
    generator = torch.Generator().manual_seed(0)
    shape = (context, config.num_key_value_heads, config.head_dim or 0)
    for layer in range(config.num_hidden_layers):  # normed keys and values are about as long
        k_TND, v_TND = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        for decoder in found.values():
            decoder.fill(layer, k_TND, v_TND)
    return found
