"""Does a model trained with MoBA retrieve over long distances? Multi-query associative recall (arXiv 2312.04927).

A row is filler in which pairs of a key and its value lie at random places, every pair twice. At the second place the
value must be predicted, so the first one must be found: by its block, among all blocks of the row. A small causal model
whose layers are all MoBA is trained on rows that grow to --lengths, then tested on new rows: accuracy by distance, with
its own attention, with the current blocks alone (top_k 1, which must fail beyond a block) and with full attention.
Chance is 1 / 64. Writes recall.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, list_of, positive_int, print_table, write_json

if TYPE_CHECKING:
    import torch

    from neomoba_dist.data.batch import Batch
    from neomoba_dist.model.neobert import NeoBERT

KEYS, VALUES, FILLERS = 256, 64, 64
LEARNT = 0.97  # accuracy at which rows grow


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the rows; seconds of training."""

    lengths: list[int]
    block_size: int
    top_k: int
    hidden_size: int
    layers: int
    tokens_per_step: int
    seconds: float
    learning_rate: float
    device: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench recall`."""
    parser.add_argument(
        "--lengths", type=list_of(positive_int), default=[8192, 16384, 32768], metavar="N,...",
        help="tokens of a row, tested and at last trained (default: 8192,16384,32768)",
    )  # fmt: skip
    parser.add_argument("--block-size", type=positive_int, default=128, metavar="N", help="of MoBA (default: 128)")
    parser.add_argument("--top-k", type=positive_int, default=8, metavar="N", help="of MoBA (default: 8)")
    parser.add_argument("--hidden-size", type=positive_int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--layers", type=positive_int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--tokens-per-step", type=positive_int, default=65536, metavar="N", help="default: 65536")
    parser.add_argument("--seconds", type=positive_int, default=240, metavar="N", help="of training (default: 240)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, metavar="X", help="default: 0.003")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for recall.json")


def make_rows(length: int, rows: int, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
    """`rows` rows of `length` tokens as one batch, and for every token the distance back to its pair, int64 [T].

    The labels are the values of second places, at the keys before them. Tokens: keys, then values, then filler.
    """
    import torch

    from neomoba_dist.data.batch import IGNORE_LABEL, Batch

    pairs, cells = min(KEYS, max(1, length // 8)), length // 2
    tokens = torch.randint(KEYS + VALUES, KEYS + VALUES + FILLERS, (rows, length), generator=generator)
    labels, distance = torch.full_like(tokens, IGNORE_LABEL), torch.zeros_like(tokens)
    for row in range(rows):
        places = 2 * torch.randperm(cells, generator=generator)[: 2 * pairs].view(pairs, 2).sort(dim=1).values
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = KEYS + torch.randint(0, VALUES, (pairs,), generator=generator)
        for column in places.unbind(1):
            tokens[row, column], tokens[row, column + 1] = keys, values
        labels[row, places[:, 1]] = values
        distance[row, places[:, 1]] = places[:, 1] - places[:, 0]
    batch = Batch(
        input_ids=tokens.flatten(),
        labels=labels.flatten(),
        position_ids=torch.arange(length).repeat(rows),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        row_ids=torch.arange(rows),
        num_valid=rows * pairs,
    )
    return batch, distance.flatten()


def make_model(setting: Setting) -> NeoBERT:
    """All layers MoBA, with the key convolution as published with FlashMoBA, in float32."""
    from neomoba_dist.config import ModelConfig
    from neomoba_dist.model.neobert import NeoBERT
    from neomoba_dist.parallel.mesh import Mesh

    config = ModelConfig(
        objective="clm",
        vocab_size=KEYS + VALUES + FILLERS,
        hidden_size=setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(1, setting.hidden_size // 64),
        num_key_value_heads=max(1, setting.hidden_size // 64),
        intermediate_size=2 * setting.hidden_size,
        max_position_embeddings=max(setting.lengths),
        position_embedding="none",
        attention="moba",
        hybrid_layer_count=0,
        moba_block_size=setting.block_size,
        moba_top_k=setting.top_k,
        key_conv_width=3,
        qk_norm=True,
        initializer_range=setting.hidden_size**-0.5,  # small rows of a small model: 0.02 takes minutes to leave chance
    )
    return NeoBERT(config, Mesh.single(setting.device), seed=0).to(setting.device)


def guesses(model: NeoBERT, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether the likeliest token is the label, where there is a label): bool [labels], int64 [labels]."""
    where = (batch.labels >= 0).nonzero()[:, 0]
    logits = model.logits(model.hidden_states(batch)[where])
    return logits.argmax(-1) == batch.labels[where], where


def train(model: NeoBERT, setting: Setting) -> list[dict[str, Any]]:
    """Rows grow by doubling once the pairs are found, or once their share of the time is over."""
    import torch

    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    top = max(setting.lengths)
    first = min(top, 2 * setting.block_size)
    steps = math.ceil(math.log2(top / first))
    lengths = [min(top, first << step) for step in range(steps + 1)]
    _step(model, optimizer, setting, make_rows(first, 1, generator)[0])  # kernels are compiled off the clock
    history, began = [], time.monotonic()
    for index, length in enumerate(lengths):
        limit = setting.seconds * (index + 2) / (len(lengths) + 1)  # the first length takes longest: all is new
        rows, step, accuracy = max(1, setting.tokens_per_step // length), 0, 0.0
        while time.monotonic() - began < limit:
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * min(1.0, (step + 1) / 50)
            _step(model, optimizer, setting, make_rows(length, rows, generator)[0])
            step += 1
            if step % 20 == 0:
                with torch.no_grad():
                    accuracy = float(
                        guesses(model, make_rows(length, rows, generator)[0].to(setting.device))[0].float().mean()
                    )
                if accuracy >= LEARNT and length < top:
                    break
        seconds = round(time.monotonic() - began, 1)
        history.append({"length": length, "steps": step, "accuracy": accuracy, "seconds": seconds})
        print(f"{length} tokens: {step} steps, accuracy {accuracy:.3f}, {seconds} s", file=sys.stderr, flush=True)
    return history


def _step(model: NeoBERT, optimizer: torch.optim.Optimizer, setting: Setting, batch: Batch) -> None:
    import torch

    loss = model(batch.to(setting.device))[0] / batch.num_valid
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test(model: NeoBERT, setting: Setting, attention: str) -> list[dict[str, Any]]:
    """Accuracy by length and distance: buckets of a factor of 4, the first of at most one block."""
    import torch

    from neomoba_dist.model.attention.layer import set_full_attention
    from neomoba_dist.model.neobert import NeoBERT

    if attention == "current block":
        config = replace(model.config, moba_top_k=1)
        control = NeoBERT(config, model.mesh, seed=0).to(setting.device)
        control.load_state_dict(model.state_dict())
        model = control
    set_full_attention(model, attention == "full")
    found = []
    for length in setting.lengths:
        generator = torch.Generator().manual_seed(2)
        right, distances = [], []
        for _ in range(8):
            batch, distance = make_rows(length, max(1, setting.tokens_per_step // (8 * length)), generator)
            with torch.no_grad():
                correct, where = guesses(model, batch.to(setting.device))
            right.append(correct.cpu())
            distances.append(distance[where.cpu()])
        correct, distance = torch.cat(right).float(), torch.cat(distances)
        low, high = 0, setting.block_size
        while low < length:
            inside = (distance > low) & (distance <= high)
            if inside.any():
                accuracy = float(correct[inside].mean())
                cell = {"length": length, "from": low + 1, "to": min(high, length), "pairs": int(inside.sum())}
                found.append({**cell, "accuracy": accuracy})
            low, high = high, 4 * high
    set_full_attention(model, False)
    return found


ATTENTIONS = ("moba", "current block", "full")


def run(args: argparse.Namespace) -> int:
    """Train, test, print, write."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: no GPU is visible to torch; use --device cpu")
    setting = Setting(
        args.lengths, args.block_size, args.top_k, args.hidden_size, args.layers, args.tokens_per_step,
        args.seconds, args.learning_rate, device,
    )  # fmt: skip
    model = make_model(setting)
    history = train(model, setting)
    cells = {attention: test(model, setting, attention) for attention in ATTENTIONS}
    lines = [["tokens", "distance", "pairs", *ATTENTIONS]]
    for row in zip(*cells.values(), strict=True):
        head = row[0]
        values = [f"{100 * cell['accuracy']:.1f} %" for cell in row]
        lines.append([str(head["length"]), f"{head['from']}-{head['to']}", str(head["pairs"]), *values])
    print_table(lines)
    if args.output is not None:
        result = {"setting": vars(setting), "chance": 1 / VALUES, "training": history, "cells": cells}
        write_json(args.output, "recall", result)
    return 0
