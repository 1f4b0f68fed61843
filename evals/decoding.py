"""Decoding with a cache, timed."""

from __future__ import annotations

import time
from pathlib import Path


def decode(folder: Path, *, prompt: int, new: int, documents: int) -> dict[str, float]:
    """Speed of decoding all but the first of `new` tokens after a prompt of random ones, and the cache.

    Returns decode_tokens_per_second, over all `documents`, and cache_bytes at the end.
    """
    import torch

    from neomoba_dist.checkpoint.load import load_model
    from neomoba_dist.generate.decode import Decoder
    from neomoba_dist.generate.stage import Stage

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_model(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, config.model.vocab_size, (documents, prompt), generator=generator).tolist()
    decoder = Decoder(Stage.of(model), [prompt + new] * documents)
    hidden = decoder.step(prompts)
    assert hidden is not None  # one pipeline stage
    tokens = decoder.stage.best_tokens(hidden[prompt - 1 :: prompt], documents)
    start = time.perf_counter()
    for _ in range(new - 1):
        tokens = decoder.stage.best_tokens(decoder.step([[token] for token in tokens]), documents)
    seconds = time.perf_counter() - start
    return {"decode_tokens_per_second": documents * (new - 1) / seconds, "cache_bytes": decoder.cache.num_bytes()}
