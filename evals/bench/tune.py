"""The fastest kernels and tiles of attention on this card, written where the code reads them.

Variants that fail, or whose output or gradients differ from those of the built-in choice, are left out and named. The
table goes to OUTPUT/tune.json and, on a GPU, to --table after every shape: training and evaluation use it from then on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.cli import list_of, positive_int, print_table, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from evals.bench._attention_timing import Setting

Work = Callable[[], "tuple[Tensor, ...]"]

# rows, keys, warps, stages, loads by descriptors, dq by atomics: what fits an SM of an H100 at D 64 and 128
TILES: tuple[tuple[Any, ...], ...] = (
    (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 2),
    (128, 64, 8, 3, True), (128, 128, 8, 2, True), (64, 64, 4, 3, True),
)  # fmt: skip
KEY_TILES: tuple[tuple[Any, ...], ...] = (
    (32, 128, 8, 3), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (16, 128, 8, 3), (32, 64, 8, 3),
    (32, 128, 8, 3, False, True), (16, 128, 8, 3, False, True), (32, 64, 8, 3, False, True),
)  # fmt: skip
SHORT = 32768  # tokens; a longer row is timed so many times less often
LARGEST_DIFFERENCE = 4e-2  # of the largest value, as the tests on a GPU allow in bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench tune`."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=list_of(positive_int), default=[32768, 131072, 8192], metavar="N,...",
        help="lengths, of which the nearest counts (default: 32768,131072,8192)",
    )  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--table", type=Path, metavar="DIR", help="default: where the code reads it")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu"), metavar="DIR")


class Variant(NamedTuple):
    """What the table would say, and what it times: output and gradients of one forward and backward pass."""

    choice: Any
    work: Work


class Clocks(NamedTuple):
    """Seconds of some works, which take turns; the most bytes that one holds beside its inputs."""

    seconds: Callable[[Mapping[str, Callable[[], Any]]], dict[str, float]]
    peak_bytes: Callable[[Callable[[], Any]], int]


class Found(NamedTuple):
    """Of one key: seconds and bytes of each variant that ran and agreed, why others did not, and the fastest."""

    key: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    left_out: dict[str, str]
    fastest: Any


def fastest(key: str, variants: list[Variant], clocks: Clocks) -> Found:
    """Time the variants of a key; the first is the built-in choice, which the others must agree with."""
    works: dict[str, Work] = {}
    left_out: dict[str, str] = {}
    want: tuple[Tensor, ...] | None = None
    for choice, work in variants:
        try:
            got = work()
        except Exception as error:  # whatever a kernel or its compiler raises, the others can still be timed
            left_out[str(choice)] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        if want is None:
            want = got
        if difference := disagreement(got, want):
            left_out[str(choice)] = difference
        else:
            works[str(choice)] = work
    del want
    held = {name: clocks.peak_bytes(work) for name, work in works.items()}
    seconds = clocks.seconds(works) if works else {}
    best = min(seconds, key=seconds.__getitem__, default=None)
    return Found(key, seconds, held, left_out, next((choice for choice, _ in variants if str(choice) == best), None))


def disagreement(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    """What is wrong with a result; empty where nothing is."""
    for number, (result, expected) in enumerate(zip(got, want, strict=True)):
        difference = float((result.float() - expected.float()).abs().max())
        if not difference <= LARGEST_DIFFERENCE * max(1.0, float(expected.float().abs().max())):
            return f"result {number} differs by {difference:.3g}"
    return ""


def settings(lengths: list[int], device: str) -> list[Setting]:
    """Phase 3's shape and the one that other kernels publish, at every length; on a CPU one small shape."""
    from evals.bench._attention_timing import Setting

    if device == "cpu":
        return [Setting(256, 4, 2, 16, 32, 3, True, "float32", device, 1)]
    return [
        Setting(tokens, *shape, "bfloat16", device, 1)
        for tokens in lengths
        for shape in ((12, 4, 64, 512, 3, False), (16, 16, 128, 512, 3, True))
    ]


def tune(setting: Setting, clocks: Clocks) -> list[Found]:
    """Everything that the code asks `tuned` for with this shape."""
    found = [full_attention_kernels(setting, packed, clocks) for packed in (True, False)]
    tiles = key_tiles = None
    if setting.device == "cuda":
        found.append(triton_tiles(setting, clocks))
        tiles = found[-1].fastest
        found.append(triton_key_tiles(setting, tiles, clocks))
        key_tiles = found[-1].fastest
    return [*found, moba_kernels(setting, tiles, key_tiles, clocks)]


def full_attention_kernels(setting: Setting, packed: bool, clocks: Clocks) -> Found:
    """The kernels of choice.FULL_ATTENTION that take the shape, on eight documents or one."""
    import torch

    from evals.bench._attention_timing import tensors
    from neomoba_dist.model.attention.kernels.choice import FULL_ATTENTION, Call
    from neomoba_dist.model.attention.kernels.full import RUN, Documents
    from neomoba_dist.model.attention.kernels.tuned import full_key

    q, k, v, grad = tensors(setting)
    call = Call(q.device, q.dtype, setting.head_dim, len(q), packed)
    step = len(q) // 8
    borders = torch.arange(0, len(q) + 1, step, dtype=torch.int32, device=q.device) if packed else None
    documents = Documents(borders, step if packed else len(q), None)
    masked = {"sdpa"} if packed else set()  # a [T, T] mask
    names = [name for name, takes in FULL_ATTENTION.items() if takes(call) and name not in masked]
    variants = [Variant(name, partial(_full, RUN[name], q, k, v, grad, setting.causal, documents)) for name in names]
    return fastest(full_key(q.dtype, setting.head_dim, packed), variants, clocks)


def triton_tiles(setting: Setting, clocks: Clocks) -> Found:
    """Tiles of the forward pass, with and without descriptors, and of dq."""
    from neomoba_dist.model.attention.kernels.triton.common import Tiles, choose_tiles

    problem, grad = _problem(setting)
    default = choose_tiles(setting.head_dim, grad.dtype, setting.block_size, setting.length)
    candidates = [default, *(Tiles(*tiles) for tiles in TILES if Tiles(*tiles) != default)]
    variants = [Variant(list(tiles), partial(_triton, problem, grad, tiles, None)) for tiles in candidates]
    return fastest(_key("tiles", setting), variants, clocks)


def triton_key_tiles(setting: Setting, tiles: list[Any] | None, clocks: Clocks) -> Found:
    """Tiles of dk and dv, with the fastest others; also those that add up dq by atomics."""
    from neomoba_dist.model.attention.kernels.triton.common import Tiles, choose_key_tiles

    problem, grad = _problem(setting)
    default = choose_key_tiles(setting.head_dim, grad.dtype, setting.block_size, setting.length)
    candidates = [default, *(Tiles(*tiles) for tiles in KEY_TILES if Tiles(*tiles) != default)]
    others = None if tiles is None else Tiles(*tiles)
    variants = [Variant(list(chosen), partial(_triton, problem, grad, others, chosen)) for chosen in candidates]
    return fastest(_key("key_tiles", setting), variants, clocks)


def moba_kernels(setting: Setting, tiles: list[Any] | None, key_tiles: list[Any] | None, clocks: Clocks) -> Found:
    """The kernels of choice.MOBA that take the shape, Triton with its fastest tiles."""
    from neomoba_dist.model.attention.kernels import ops
    from neomoba_dist.model.attention.kernels.choice import MOBA, MobaCall
    from neomoba_dist.model.attention.kernels.layout import Geometry

    problem, grad = _problem(setting)
    geometry = Geometry(setting.block_size, setting.causal)
    variants = []
    for name, takes in MOBA.items():
        if name == "triton" and takes(MobaCall.of(problem)):
            from neomoba_dist.model.attention.kernels.triton.common import Tiles

            chosen = (None if given is None else Tiles(*given) for given in (tiles, key_tiles))
            variants.append(Variant(name, partial(_triton, problem, grad, *chosen)))
        elif takes(MobaCall.of(problem)) and (name != "torch" or setting.device == "cpu"):
            operands = (problem.q, problem.k, problem.v, problem.block_indices, *geometry, name)
            variants.append(Variant(name, partial(_operator, ops, operands, grad)))
    return fastest(_key("moba", setting), variants, clocks)


def _key(what: str, setting: Setting) -> str:
    import torch

    from neomoba_dist.model.attention.kernels.tuned import moba_key

    return moba_key(what, getattr(torch, setting.dtype), setting.head_dim, setting.block_size)


def _problem(setting: Setting) -> tuple[Any, Tensor]:
    """One document and what its queries choose; and a gradient."""
    from evals.bench._attention_timing import tensors
    from neomoba_dist.model.attention.kernels.layout import Problem, make_layout
    from neomoba_dist.model.attention.moba import block_means, select_blocks

    q, k, v, grad = (x.detach() for x in tensors(setting))
    means = block_means(k, block_size=setting.block_size)
    options: dict[str, Any] = {"block_size": setting.block_size, "top_k": setting.top_k, "causal": setting.causal}
    layout = make_layout(len(q), len(k), setting.block_size, None, None, None, q.device)
    return Problem(q, k, v, select_blocks(q, means, **options), layout, setting.causal), grad


def _full(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, documents: Any
) -> tuple[Tensor, ...]:
    import torch

    out = kernel(q, k, v, causal, documents)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def _operator(ops: Any, operands: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, ...]:
    out, lse, index = ops.attend(*operands)
    return out, *ops.attend_backward(grad, None, out, lse, index, *operands)


def _triton(problem: Any, grad: Tensor, tiles: Any, key_tiles: Any) -> tuple[Tensor, ...]:
    from neomoba_dist.model.attention.kernels.triton.backward import attend_triton_backward
    from neomoba_dist.model.attention.kernels.triton.forward import attend_triton

    out, lse, index = attend_triton(problem, tiles)
    return out, *attend_triton_backward(problem, out, lse, grad, None, index, tiles, key_tiles)


def run(args: argparse.Namespace) -> int:
    """Time, write, print."""
    import torch

    from evals.bench._memory import peak_above
    from evals.bench._timing import least
    from neomoba_dist.model.attention.kernels.tuned import FOLDER, versions, write_table

    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "evals", "bench", "tune", *sys.argv[3:]]),
        "device": device,
        **versions(),
        "rows": [],
    }
    written = None
    for setting in settings(args.tokens, args.device):
        repetitions = max(1, args.repetitions * SHORT // max(SHORT, setting.length))
        timer = partial(least, device=args.device, threads=1, repetitions=repetitions)
        found = tune(setting, Clocks(timer, partial(peak_above, device=args.device)))
        result["rows"] += [{"setting": setting._asdict(), **row._asdict()} for row in found]
        write_json(args.output, "tune", result)
        if args.device == "cuda":
            chosen = {row.key: row.fastest for row in found if row.fastest is not None}
            written = write_table(device, args.table or FOLDER, setting.length, chosen)
        print(f"{setting.length} tokens x {setting.heads}, D {setting.head_dim}: tuned", file=sys.stderr, flush=True)
    print_table([["what", "fastest", "ms, MiB", "others, ms, MiB"], *(cells(row) for row in result["rows"])])
    print(f"{device}, torch {torch.__version__}" + (f"; the code reads {written}" if written else ""))
    return 0


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    best, seconds, held = str(row["fastest"]), row["seconds"], row["peak_bytes"]
    figures = {name: f"{1e3 * seconds[name]:.3g}, {held[name] / 2**20:.0f}" for name in seconds}
    others = [f"{name} {figures[name]}" for name in sorted(seconds, key=seconds.__getitem__) if name != best]
    others += [f"{name}: {why}" for name, why in row["left_out"].items()]
    what = f"{row['key']}, {row['setting']['length']} tokens"
    return [what, best, figures.get(best, "-"), "; ".join(others)]
