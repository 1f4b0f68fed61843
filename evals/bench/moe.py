"""A mixture-of-experts layer against a dense layer of the same active parameters: forward and backward on one device.

The dense layer is as wide as the experts of one token together. Both take turns, and the least time of
each counts (_timing.py). The goal is a ratio of at most 1.25 on the CPU and 1.15 on a GPU. Needs torch alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, print_table

if TYPE_CHECKING:
    import torch

GOALS = {"cpu": 1.25, "cuda": 1.15}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m evals bench moe`."""
    for name, default, what in (
        ("tokens", 8192, "tokens of the batch"),
        ("hidden", 512, "width of the residual stream"),
        ("experts", 8, "experts"),
        ("top-k", 2, "experts per token"),
        ("width", 1024, "width of an expert"),
        ("threads", 1, "CPU threads"),
        ("repetitions", 5, "the least of so many counts"),
    ):
        parser.add_argument(f"--{name}", type=positive_int, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for moe.json")


def layers(args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One pass, forward and backward, of each layer on the same tokens."""
    import torch

    from neomoba_dist.config import ModelConfig
    from neomoba_dist.model.init import Initializer
    from neomoba_dist.model.mlp import SwiGLU
    from neomoba_dist.model.moe.layer import MoE
    from neomoba_dist.parallel.mesh import Mesh

    config = ModelConfig(
        hidden_size=args.hidden,
        intermediate_size=args.top_k * args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width,
    )
    init = Initializer(Mesh.single(device), 0, 0.02, dtype)
    dense = SwiGLU("dense", config, init).to(device)
    mixture = MoE("moe", 0, config, init).to(device)
    generator = torch.Generator().manual_seed(0)
    x_TH, grad_TH = (torch.randn(args.tokens, args.hidden, generator=generator).to(device, dtype) for _ in range(2))
    x_TH.requires_grad_()
    positions = torch.arange(args.tokens, device=device)

    def run_mixture() -> None:
        y_TH, aux_loss, _ = mixture(x_TH, positions)
        torch.autograd.backward([y_TH, aux_loss], [grad_TH, torch.ones_like(aux_loss)])

    return {"dense": lambda: dense(x_TH).backward(grad_TH), "moe": run_mixture}


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: no GPU is visible to torch; use --device cpu")
    if args.top_k > args.experts:
        raise EvalError(f"--top-k {args.top_k} is larger than --experts {args.experts}; lower it")
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    torch.set_num_threads(args.threads)
    from evals.bench._timing import least

    work = layers(args, device, getattr(torch, dtype))
    fastest = least(work, device=device, threads=args.threads, repetitions=args.repetitions)
    result: dict[str, Any] = {
        "command": ["python", "-m", "evals", *sys.argv[1:]],
        "torch": torch.__version__,
        "device": device,
        "dtype": dtype,
        **{f"{name}_seconds": value for name, value in fastest.items()},
        "ratio": fastest["moe"] / fastest["dense"],
        "goal": GOALS[device],
    }
    header = ["tokens", "hidden", "experts", "top-k", "width", "dense s", "moe s", "ratio", "goal"]
    sizes = [args.tokens, args.hidden, args.experts, args.top_k, args.width]
    figures = [f"{fastest['dense']:.3f}", f"{fastest['moe']:.3f}", f"{result['ratio']:.3f}", f"{result['goal']:.2f}"]
    print_table([header, [*map(str, sizes), *figures]])
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "moe.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
