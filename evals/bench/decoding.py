"""Decoding: one token at a long context against transformers on the same weights, and what the cache and GQA save.

1. One token more at --context tokens, whose keys and values are in the cache: transformers' Qwen3 with both of its
   caches, ours with full attention and with MoBA. All have the same weights and the same random keys and values, and
   take turns; the table shows how far logits are from those of transformers (MoBA attends to less).
2. Time per token of a text that grows from --prompt tokens by --new under full attention, with and without a cache,
   with as many KV heads as query heads (MHA) and with the model's own (GQA).

The model has Qwen3-0.6B's width and a seventh of its layers and of its vocabulary; --set changes it. Times are those of
evals/bench/_timing.py; the least of the repetitions counts. --output gets decoding.json and per_token_times.png.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, print_table, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neomoba_dist.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
SEVENTH = ("num_hidden_layers=4", "vocab_size=21760", "hybrid_layer_count=0")
GOALS = {"ours, full attention": 1.0, "ours, MoBA": 0.5}  # of the time of transformers
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench decoding`."""
    parser.add_argument(
        "--ds-config", type=Path, default=ROOT / "ds_configs/qwen3_moba.json", metavar="FILE",
        help="whose model is decoded (default: qwen3_moba.json with a seventh of its layers and vocabulary)",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON"
    )
    parser.add_argument("--context", type=positive_int, default=32768, metavar="N", help="tokens (default: 32768)")
    parser.add_argument("--prompt", type=positive_int, default=64, metavar="N", help="of a growing text (default: 64)")
    parser.add_argument("--new", type=positive_int, default=192, metavar="N", help="tokens it grows by (default: 192)")
    parser.add_argument("--repetitions", type=positive_int, default=10, metavar="N", help="at --context (default: 10)")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for decoding.json and per_token_times.png")


def read_model(args: argparse.Namespace) -> ModelConfig:
    """The model of --ds-config. Raises ConfigError, EvalError."""
    from neomoba_dist.config import load_config

    smaller = [f"neomoba.model.{key}" for key in SEVENTH]
    model = load_config(args.ds_config, [*smaller, *args.set]).model
    if not model.causal or not model.qk_norm or model.num_experts:
        raise EvalError(
            f"--ds-config {args.ds_config}: transformers' Qwen3 is dense, causal and has qk_norm; set these"
        )
    if set(model.layer_attentions) != {"moba"}:
        raise EvalError(
            "--set neomoba.model.attention: layers must be MoBA, which decoding with full attention turns off"
        )
    return model


def measure_context(model: ModelConfig, args: argparse.Namespace, device: str, dtype: str) -> list[dict[str, Any]]:
    """Seconds and cache of everybody, and the largest difference of their logits to those of transformers."""
    import torch

    from evals.bench._decoding_peers import in_context
    from evals.bench._timing import in_turns

    room = args.context + args.repetitions + 1
    decoders = in_context(model, args.context, room, getattr(torch, dtype), device)
    logits: dict[str, Any] = {}

    def one_token(name: str) -> None:
        logits[name] = decoders[name].step([1])

    works = {name: lambda name=name: one_token(name) for name in decoders}
    for work in works.values():
        work()
    seconds = in_turns(works, device=device, threads=args.threads, repetitions=args.repetitions)
    reference = next(iter(decoders))
    best = min(min(times) for name, times in seconds.items() if name.startswith("transformers"))
    return [
        {
            "name": name,
            "seconds": seconds[name],
            "least": min(seconds[name]),
            "ratio": min(seconds[name]) / min(seconds[reference]),
            "ratio_to_fastest": min(seconds[name]) / best,
            "goal": GOALS.get(name),
            "cache_bytes": decoder.num_bytes(),
            "difference": float((logits[name] - logits[reference]).abs().max()),
            "largest_logit": float(logits[reference].abs().max()),
        }
        for name, decoder in decoders.items()
    ]


def measure_tokens(model: ModelConfig, args: argparse.Namespace, device: str, dtype: str) -> list[dict[str, Any]]:
    """Seconds of every token after the prompt, with and without a cache, MHA and GQA."""
    import torch

    from evals.bench._decoding_peers import OurDecoder, random_stage
    from evals.bench._timing import seconds

    heads = {"MHA": model.num_attention_heads, "GQA": model.num_key_value_heads}
    room = args.prompt + args.new
    decoders: dict[tuple[str, bool], OurDecoder] = {}
    for kind, number in heads.items():
        config = replace(model, attention="full", num_key_value_heads=number)
        stage = random_stage(config, getattr(torch, dtype), device)
        decoders |= {(kind, cached): OurDecoder(stage, room, cached=cached) for cached in (True, False)}
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in decoders}
    differences = dict.fromkeys(heads, 0.0)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.vocab_size, (args.prompt,), generator=generator).tolist()
    logits = {key: decoder.step(prompt) for key, decoder in decoders.items()}
    for _ in range(args.new):
        for (kind, cached), decoder in decoders.items():
            token = int(logits[kind, True].argmax()) if cached else decoders[kind, True].text[-1]

            def step(decoder: Any = decoder, key: tuple[str, bool] = (kind, cached), token: int = token) -> None:
                logits[key] = decoder.step([token])

            times[kind, cached].append(seconds(step, device, args.threads))
        for kind in heads:
            apart = float((logits[kind, True] - logits[kind, False]).abs().max())
            differences[kind] = max(differences[kind], apart)
    return [
        {
            "heads": kind,
            "kv_heads": heads[kind],
            "cached": cached,
            "seconds": times[kind, cached],
            "tokens_per_second": args.new / sum(times[kind, cached]),
            "cache_bytes": decoder.num_bytes(),
            "difference": differences[kind],
        }
        for (kind, cached), decoder in decoders.items()
    ]


def figure(rows: list[dict[str, Any]], prompt: int) -> Figure:
    """Milliseconds per token against the length of the text."""
    from matplotlib.figure import Figure

    from evals.plots import BLUE, ORANGE, style

    with style():
        drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = drawn.subplots()
        for row in rows:
            lengths = range(prompt + 1, prompt + 1 + len(row["seconds"]))
            colour = BLUE if row["heads"] == "GQA" else ORANGE
            name = f"{row['heads']}, {'cache' if row['cached'] else 'no cache'}"
            line = "-" if row["cached"] else "--"
            axes.plot(lengths, [1e3 * x for x in row["seconds"]], line, color=colour, linewidth=1, label=name)
        axes.set_xlabel("tokens of the text")
        axes.set_title("Milliseconds per token")
        axes.set_yscale("log")
        axes.legend()
    return drawn


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import torch

    from evals.bench._processor import processor_name

    model = read_model(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    torch.set_num_threads(args.threads)
    context = measure_context(model, args, device, dtype)
    print(f"One token at {args.context:,} tokens of context, {model.num_hidden_layers} layers:")
    print_table([CONTEXT_HEADER, *map(_context_cells, context)])
    tokens = measure_tokens(model, args, device, dtype)
    print(f"\nOne document from {args.prompt} to {args.prompt + args.new} tokens:")
    print_table([TOKENS_HEADER, *map(_token_cells, tokens)])
    machine = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    print(f"{machine}, torch {torch.__version__}, {dtype}")
    if args.output is not None:
        from evals.plots import save_png

        facts = {"command": ["python", "-m", "evals", *sys.argv[1:]], "machine": machine, "torch": torch.__version__}
        write_json(args.output, "decoding", {**facts, "dtype": dtype, "context": context, "tokens": tokens})
        save_png(figure(tokens, args.prompt), args.output / "per_token_times.png")
    return 0


CONTEXT_HEADER = ("decoder", "ms", "of DynamicCache", "of the faster", "goal", "cache MiB", "logits differ by")
TOKENS_HEADER = ("heads", "cache", "tokens/s", "first ms", "last ms", "cache MiB", "logits differ by")


def _context_cells(row: dict[str, Any]) -> list[str]:
    goal = "-" if row["goal"] is None else f"{row['goal']:.1f}"
    times = [f"{1e3 * row['least']:.2f}", f"{row['ratio']:.2f}", f"{row['ratio_to_fastest']:.2f}", goal]
    return [row["name"], *times, f"{row['cache_bytes'] / MIB:.1f}", f"{row['difference']:.1e}"]


def _token_cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['heads']}, {row['kv_heads']} KV heads"
    times = [f"{row['tokens_per_second']:.2f}", *(f"{1e3 * row['seconds'][i]:.2f}" for i in (0, -1))]
    cache = ["yes" if row["cached"] else "no", *times, f"{row['cache_bytes'] / MIB:.1f}"]
    return [name, *cache, f"{row['difference']:.1e}"]
