"""Three models at equal active parameters and an equal token budget: base, base + GQA, base + GQA + MoE.

The configuration file describes the third one. The first has as many key/value heads as query heads; each has the
feed-forward width that gives a token as many weights as in the first. Everything else is the same: corpus, tokenizer,
validation rows, seed, length, tokens. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, print_table
from evals.runs import Run, read_run
from neomoba_dist.config import Config, ModelConfig, load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"base": "base", "gqa": "base + GQA", "moe": "base + GQA + MoE"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m evals ablation three_way`."""
    parser.add_argument(
        "--ds_config", type=Path, default=ROOT / "ds_configs" / "three_way_tiny.json", metavar="FILE",
        help="the third model and its training (default: ds_configs/three_way_tiny.json)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs and results")
    parser.add_argument("--ranks", type=positive_int, default=1, metavar="N", help="processes or GPUs (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH.TO.KEY=VALUE", help="changes keys of the JSON")
    parser.add_argument("--prompt", type=positive_int, default=128, metavar="N", help="prompt's tokens (default: 128)")
    parser.add_argument("--new", type=positive_int, default=64, metavar="N", help="tokens decoded (default: 64)")
    parser.add_argument("--documents", type=positive_int, default=4, metavar="N", help="decoded at once (default: 4)")


def variants(model: ModelConfig) -> dict[str, dict[str, int]]:
    """The keys of `neomoba.model` in which the three differ, widths rounded to multiples of 8."""
    assert model.head_dim is not None  # resolved by ModelConfig
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    # the keys' and values' weights that grouping saves, over SwiGLU's three matrices; all are hidden_size long
    wider = model.intermediate_size + 2 * (heads - kv_heads) * model.head_dim / 3
    experts = model.num_experts_per_tok + model.num_shared_experts
    expert_width = (wider - model.num_experts / 3) / experts  # the router's weights are active too
    dense = {"num_experts": 0, "intermediate_size": model.intermediate_size}
    return {
        "base": {**dense, "num_key_value_heads": heads},
        "gqa": {**dense, "num_key_value_heads": kv_heads, "intermediate_size": _multiple_of_8(wider)},
        "moe": {"intermediate_size": _multiple_of_8(wider), "moe_intermediate_size": _multiple_of_8(expert_width)},
    }


def _multiple_of_8(width: float) -> int:
    return max(8, round(width / 8) * 8)


def active_parameters(model: ModelConfig) -> int:
    """Weights of all layers that one token passes, without embeddings and norms."""
    from neomoba_dist.train.flops import feed_forward_weights

    assert model.head_dim is not None
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    return model.num_hidden_layers * attention + feed_forward_weights(model)


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, measure, print, write."""
    config = load_config(args.ds_config, args.set)
    check(config)
    found: dict[str, dict[str, Any]] = {}
    for name, keys in variants(config.model).items():
        folder = args.output / name
        words = [*args.set, *(f"neomoba.model.{key}={value}" for key, value in keys.items())]
        require_same(folder, load_config(args.ds_config, words))
        train(args, folder, words)
        found[name] = measure(read_run(folder), args)
    lines = table(found)
    print_table(lines)
    import torch

    result = {"command": sys.argv[1:], "torch": torch.__version__, "ranks": args.ranks, "models": found}
    (args.output / "three_way.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    from evals.plots import save_png

    save_png(figure({name: read_run(args.output / name) for name in NAMES}, found), args.output / "three_way.png")
    print(f"three_way: {args.output / 'three_way.json'}, {args.output / 'three_way.png'}")
    return 0


def check(config: Config) -> None:
    """Raises EvalError where the file does not describe the third model."""
    model = config.model
    if not model.num_experts or model.num_key_value_heads == model.num_attention_heads:
        raise EvalError(
            f"{config.source}: describes no model with grouped queries and experts; set neomoba.model.num_experts, and "
            "num_key_value_heads below num_attention_heads"
        )
    if not model.causal:
        raise EvalError(f"{config.source}: only a causal model is decoded; set neomoba.model.objective to clm")
    if config.data.validation is None:
        raise EvalError(f"{config.source}: the models are compared by it; set neomoba.data.validation")


def require_same(folder: Path, config: Config) -> None:
    """Raises EvalError where the folder holds a run with other settings, which would pass for this one's."""
    file = folder / "config.json"
    if not file.is_file():
        return
    then, now = (flat(tree) for tree in (json.loads(file.read_text(encoding="utf-8")), config.to_dict()))
    other = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    if other:
        shown = ", ".join(f"{key} {json.dumps(then.get(key))}, not {json.dumps(now.get(key))}" for key in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise EvalError(f"{folder}: was trained with {shown}{more}; give another --output, or delete this folder")


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def train(args: argparse.Namespace, folder: Path, words: Sequence[str]) -> None:
    """One run; a finished one is left alone. words: keys of the JSON. Raises EvalError when it fails."""
    script = [str(ROOT / "launch" / "pretrain.py")]
    if args.ranks > 1:
        script = ["--num_gpus", str(args.ranks), *script]
    starter = sys.executable if args.ranks == 1 else str(Path(sys.executable).with_name("deepspeed"))
    command = [starter, *script, "--ds_config", str(args.ds_config), "--output_dir", str(folder), "--set"]
    if subprocess.run([*command, *words], check=False).returncode:
        raise EvalError(f"{folder}: the training failed; its message is above")


def measure(trained: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model."""
    seconds, cache = decode(trained.folder, args)
    model = trained.config.model
    return {
        "active_parameters": active_parameters(model),
        "parameters": trained.parameters,
        "num_key_value_heads": model.num_key_value_heads,
        "feed_forward_width": model.moe_intermediate_size if model.num_experts else model.intermediate_size,
        "tokens": trained.tokens,
        "validation_loss": trained.validation_loss,
        "train_tokens_per_second": trained.tokens_per_second,
        "decode_tokens_per_second": args.documents * (args.new - 1) / seconds,
        "cache_bytes": cache,
        "cached_tokens": args.documents * (args.prompt + args.new),
    }


def decode(folder: Path, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds of decoding all but the first new token, after the prompt, and the bytes of the cache."""
    import torch

    from neomoba_dist.checkpoint.load import load_model
    from neomoba_dist.generate.decode import Decoder
    from neomoba_dist.generate.stage import Stage

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_model(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    size = (args.documents, args.prompt)
    prompts = torch.randint(0, config.model.vocab_size, size, generator=generator).tolist()
    decoder = Decoder(Stage.of(model), [args.prompt + args.new] * args.documents)
    hidden = decoder.step(prompts)
    assert hidden is not None  # one pipeline stage
    tokens = decoder.best_tokens(hidden[args.prompt - 1 :: args.prompt], args.documents)
    start = time.perf_counter()
    for _ in range(args.new - 1):
        tokens = decoder.best_tokens(decoder.step([[token] for token in tokens]), args.documents)
    return time.perf_counter() - start, decoder.cache.num_bytes()


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One column per model."""
    rows = [
        ("active parameters", "active_parameters", ",d"),
        ("all parameters", "parameters", ",d"),
        ("key/value heads", "num_key_value_heads", "d"),
        ("width of an MLP or expert", "feed_forward_width", "d"),
        ("tokens", "tokens", ",d"),
        ("validation loss", "validation_loss", ".4f"),
        ("training, tokens/s", "train_tokens_per_second", ",.0f"),
        ("decoding, tokens/s", "decode_tokens_per_second", ",.1f"),
        ("cache, bytes", "cache_bytes", ",d"),
    ]
    lines = [["", *(NAMES[name] for name in found)]]
    return lines + [[label, *(format(figures[key], form) for figures in found.values())] for label, key, form in rows]


def figure(runs: dict[str, Run], found: dict[str, dict[str, Any]]) -> Figure:
    """Validation loss over tokens; speed and cache relative to the base."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from evals.plots import BLUE, MUTED, ORANGE, style

    colours = {"base": MUTED, "gqa": BLUE, "moe": ORANGE}
    with style():
        drawn = Figure(figsize=(9.6, 3.0), layout="constrained")
        loss_axes, speed_axes = drawn.subplots(1, 2, width_ratios=(3, 2))
        for name, trained in runs.items():
            tokens, losses = trained.series("validation_loss", 0)
            loss_axes.plot(tokens, losses, color=colours[name], marker="o", markersize=3, label=NAMES[name])
        loss_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        loss_axes.set(xlabel="tokens seen in training", ylabel="validation loss, nats per token")
        loss_axes.legend()
        keys = ("train_tokens_per_second", "decode_tokens_per_second", "cache_bytes")
        for place, (name, figures) in enumerate(found.items()):
            heights = [figures[key] / found["base"][key] for key in keys]
            speed_axes.bar([x + 0.27 * (place - 1) for x in range(3)], heights, width=0.24, color=colours[name])
        speed_axes.set_xticks(range(3), ["training\nspeed", "decoding\nspeed", "cache\nbytes"])
        speed_axes.set_ylabel("relative to base")
        return drawn
