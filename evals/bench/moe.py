"""A mixture-of-experts layer against a dense layer of the same active parameters: forward and backward on one device.

The dense layer is as wide as the experts of one token together. Both take turns, and the least time of
each counts (_timing.py). On a GPU both run as training runs them, compiled and replayed as a CUDA graph; `--eager`
leaves that out. Needs torch alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import EvalError, positive_int, print_table, write_json

if TYPE_CHECKING:
    import torch

SMALL_GOAL, LARGE_GOAL, SMALL_TOKENS = 1.25, 1.15, 8192  # the large one: on a GPU with more tokens


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
    parser.add_argument("--eager", action="store_true", help="on a GPU: neither compiled nor as a CUDA graph")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for moe.json")


def layers(args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One pass, forward and backward, of each layer on the same tokens."""
    import torch

    from evals.bench._timing import as_graph
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
    if device == "cuda" and not args.eager:
        dense.compile(dynamic=False, fullgraph=True)
        mixture.compile(dynamic=False, fullgraph=True)
    inputs = {"dense": [x_TH, *dense.parameters()], "moe": [x_TH, *mixture.parameters()]}

    def run_dense() -> None:
        torch.autograd.grad(dense(x_TH), inputs["dense"], grad_TH)

    def run_mixture() -> None:
        y_TH, aux_loss, _ = mixture(x_TH, positions)
        torch.autograd.grad([y_TH, aux_loss], inputs["moe"], [grad_TH, torch.ones_like(aux_loss)])

    works = {"dense": run_dense, "moe": run_mixture}
    if device == "cpu" or args.eager:
        return works
    return {name: as_graph(work) for name, work in works.items()}


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
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "device": device,
        "dtype": dtype,
        **{name: getattr(args, name) for name in ("tokens", "hidden", "experts", "top_k", "width")},
        **{f"{name}_seconds": value for name, value in fastest.items()},
        "ratio": fastest["moe"] / fastest["dense"],
        "goal": LARGE_GOAL if device == "cuda" and args.tokens > SMALL_TOKENS else SMALL_GOAL,
    }
    header = ["tokens", "hidden", "experts", "top-k", "width", "dense ms", "moe ms", "ratio", "goal"]
    sizes = [args.tokens, args.hidden, args.experts, args.top_k, args.width]
    times = [f"{1e3 * fastest[name]:.2f}" for name in ("dense", "moe")]
    figures = [*times, f"{result['ratio']:.3f}", f"{result['goal']:.2f}"]
    print_table([header, [*map(str, sizes), *figures]])
    print(f"{result['machine']}, torch {result['torch']}")
    if args.output is not None:
        write_json(args.output, "moe", result)
    return 0
