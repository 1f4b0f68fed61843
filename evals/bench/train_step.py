"""Time, memory and MFU of whole training steps on one device: engine, clipping and optimizer included.

Takes the model, micro-batch, ZeRO stage and recomputation of a phase's JSON, fills the batches with random tokens (one
document per row) and runs real updates of the DeepSpeed engine. MFU counts the operations of train/flops.py: sparse
attention by its own pairs, recomputation not at all. Phases whose steps are partly full are timed both ways. Writes
NAME.json, NAME being the phase's. Started by torchrun, it times the layout of the JSON on so many ranks.

--peer times another way to train the same model, taking turns with ours: `plain`, a plain PyTorch loop; `hf`,
transformers' Qwen3 with accelerate, for which the model becomes a causal one with full attention and norms on q and k.
With one CPU thread both are timed by CPU time, which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench._processor import processor_name
from evals.cli import EvalError, positive_int, print_table, write_json

if TYPE_CHECKING:
    from evals.bench._train_peers import Peer
    from neomoba_dist.config import BatchPlan, Config
    from neomoba_dist.data.batch import Batch
    from neomoba_dist.train.engine import Engine

# dense bf16 TFLOP/s of the maker's data sheet
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
# tokens per second of ours over a peer's, by device
GOALS = {("plain", "cpu"): 0.97, ("hf", "cpu"): 1.1, ("hf", "cuda"): 1.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench train_step`."""
    parser.add_argument("--ds-config", required=True, type=Path, metavar="FILE", help="JSON of a phase")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON"
    )
    parser.add_argument(
        "--micro-batches", type=positive_int, default=8, metavar="N",
        help="of one update (default: 8; the JSON's own number of accumulation steps is for many GPUs)",
    )  # fmt: skip
    parser.add_argument("--peer", choices=("plain", "hf"), help="what else to train, and compare with")
    parser.add_argument("--steps", type=positive_int, default=3, metavar="N", help="timed updates (default: 3)")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="of the device, for MFU (default: known for H200, H100, A100)"
    )
    parser.add_argument("--profile", action="store_true", help="also the time of one update by kernel")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the result")


def read_config(args: argparse.Namespace, world: int) -> tuple[Config, BatchPlan]:
    """The phase with updates of --micro-batches on `world` ranks; on one without its layout. Raises ConfigError,
    EvalError."""
    from neomoba_dist.config import load_config

    changes = list(args.set)
    if args.peer == "hf":
        from evals.bench._train_peers import QWEN3

        changes += [f"neomoba.model.{key}" for key in QWEN3]
    config = load_config(args.ds_config, changes)
    if config.model.num_decoder_layers:
        raise EvalError(f"--ds-config {args.ds_config}: an encoder-decoder, which is not timed here; give another one")
    tokens = args.micro_batches * config.micro_batch_size * config.phase.sequence_length
    if world == 1:
        axes = ("tensor_model", "pipeline_model", "context")
        changes += [f"neomoba.parallel.{axis}_parallel_size=1" for axis in axes]
    config = load_config(args.ds_config, [*changes, f"neomoba.phase.tokens_per_update={tokens}"])
    return config, config.plan(world)


def random_batches(config: Config, plan: BatchPlan) -> list[Batch]:
    """The micro-batches of one update, alike on all ranks: rows of one document, labels as the objective has them."""
    import torch

    from neomoba_dist.data.batch import IGNORE_LABEL, Batch
    from neomoba_dist.data.build import max_documents

    generator, length = torch.Generator().manual_seed(0), config.phase.sequence_length
    rows, batches = plan.micro_batch_size, []
    borders = (torch.arange(max_documents(config.data, rows) + 1) * length).clamp(max=rows * length)
    for _ in range(plan.gradient_accumulation_steps):
        tokens = torch.randint(0, config.model.vocab_size, (rows * length,), generator=generator)
        labels = tokens.roll(-1)
        labels.view(rows, length)[:, -1] = IGNORE_LABEL
        if config.model.objective == "mlm":
            kept = torch.rand(tokens.shape, generator=generator) < config.data.mlm_probability
            labels = torch.where(kept, tokens, IGNORE_LABEL)
        batches.append((tokens, labels))
    replicas = plan.rows_per_update // (rows * plan.gradient_accumulation_steps)
    counted = replicas * sum(int((labels != IGNORE_LABEL).sum()) for _, labels in batches)
    return [
        Batch(
            input_ids=tokens,
            labels=labels,
            position_ids=torch.arange(length).repeat(rows),
            cu_seqlens=borders.int(),
            row_ids=torch.arange(rows),
            num_valid=counted,
        )
        for tokens, labels in batches
    ]


def measure(engine: Engine, batches: list[Batch], config: Config, full: bool, steps: int) -> dict[str, Any]:
    """Seconds of the fastest of `steps` updates after one to warm up, and what follows from them."""
    import torch

    from neomoba_dist.train.flops import step_flops

    on_gpu = engine.mesh.device.type == "cuda"
    engine.set_full_attention(full)
    rate, seconds = config.phase.learning_rate, []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = engine.update(batches, rate).loss
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    flops, best = step_flops(config.model, lengths, batches[0].num_valid, full), min(seconds[1:])
    tokens = config.phase.tokens_per_update
    return {
        "attention": "full" if full else "moba",
        "tokens": tokens,
        "length": config.phase.sequence_length,
        "seconds": best,
        "first_seconds": seconds[0],
        "tokens_per_second": tokens / best,
        "tflops": flops / best / 1e12,
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def compare(
    engine: Engine, peer: Peer, batches: list[Batch], config: Config, args: argparse.Namespace
) -> dict[str, Any]:
    """Updates of both in turns, after one each to warm up: seconds, losses, tokens per second of ours over theirs."""
    import torch

    from evals.bench._timing import in_turns

    device, rate = engine.mesh.device.type, config.phase.learning_rate
    engine.set_full_attention(config.phase.full_attention_fraction == 1)
    losses: dict[str, list[Any]] = {"ours": [], args.peer: []}
    works = {
        "ours": lambda: losses["ours"].append(engine.update(batches, rate).loss),
        args.peer: lambda: losses[args.peer].append(peer.update(batches)),
    }
    for work in works.values():
        work()
    seconds = in_turns(works, device=device, threads=torch.get_num_threads(), repetitions=args.steps)
    return {
        "peer": args.peer,
        "seconds": seconds,
        "losses": {name: [float(loss) for loss in found] for name, found in losses.items()},
        "tokens_per_second": {name: config.phase.tokens_per_update / min(times) for name, times in seconds.items()},
        "ratio": min(seconds[args.peer]) / min(seconds["ours"]),
        "goal": GOALS.get((args.peer, device)),
    }


def print_comparison(found: dict[str, Any]) -> None:
    """A line for each side."""
    goal = "-" if found["goal"] is None else f"{found['goal']:.2f}"
    lines = [["who", "tokens/s", "s/step", "first loss", "last loss", "ours / theirs", "goal"]]
    for name, losses in found["losses"].items():
        rates = [f"{found['tokens_per_second'][name]:,.0f}", f"{min(found['seconds'][name]):.3f}"]
        ratio = ["-", "-"] if name == "ours" else [f"{found['ratio']:.3f}", goal]
        lines.append([name, *rates, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", *ratio])
    print_table(lines)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    try:
        from neomoba_dist.train.engines import build_engine
    except ImportError as error:
        raise EvalError(f"training steps need DeepSpeed ({error}); install requirements.txt") from error
    import torch

    from evals.bench._profile import kernel_times, profile_lines
    from neomoba_dist.parallel.launcher import initialize_process_group, map_launcher_environment
    from neomoba_dist.parallel.mesh import Mesh

    peer = None
    if args.peer:  # before there is a launcher's environment, which accelerate would join too
        from evals.bench._train_peers import PEERS

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peer = PEERS[args.peer](*read_config(args, 1), device)
    _, world = map_launcher_environment()
    if args.peer and world > 1:
        raise EvalError("--peer trains in one process; start it without torchrun")
    config, plan = read_config(args, world)
    mesh = Mesh.build(config.parallel, initialize_process_group())
    engine = build_engine(config, plan, mesh)
    machine = torch.cuda.get_device_name() if mesh.device.type == "cuda" else processor_name()
    peak = args.peak_tflops or next((peak for name, peak in PEAKS.items() if name in machine), None)
    batches, fraction = random_batches(config, plan), config.phase.full_attention_fraction
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "peak_tflops": peak, "rows": []}

    def keep() -> None:  # after every row: a run that is stopped keeps what it has
        if mesh.rank == 0 and args.output is not None:
            write_json(args.output, config.phase.name, result)

    if peer is None:
        for full in [False, True] if 0 < fraction < 1 else [fraction == 1]:
            row = measure(engine, batches, config, full, args.steps)
            result["rows"].append({"phase": config.phase.name, **row, "mfu": row["tflops"] / peak if peak else None})
            if args.profile:
                update = functools.partial(engine.update, batches, config.phase.learning_rate)
                result["rows"][-1]["profile"] = kernel_times(update, mesh.device.type)
            keep()
    else:
        result["comparison"] = compare(engine, peer, batches, config, args)
        keep()
    if mesh.rank == 0:
        if peer is None:
            print_table([HEADER, *(_cells(row) for row in result["rows"])])
            for row in result["rows"] if args.profile else []:
                print(f"\n{row['phase']}, {row['attention']}: one update")
                print_table(profile_lines(row["profile"]))
        else:
            print_comparison(result["comparison"])
        print(f"{machine}, torch {torch.__version__}, {config.dtype_name}")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
    return 0


HEADER = ("phase", "attention", "row", "tokens", "s/step", "tokens/s", "TFLOP/s", "MFU", "peak GiB")


def _cells(row: dict[str, Any]) -> list[str]:
    mfu, peak = row["mfu"], row["peak_gib"]
    return [
        row["phase"],
        row["attention"],
        str(row["length"]),
        str(row["tokens"]),
        f"{row['seconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tflops']:.1f}" if row["tflops"] >= 1 else f"{row['tflops']:.2g}",
        f"{100 * mfu:.1f} %" if mfu is not None else "-",
        f"{peak:.1f}" if peak is not None else "-",
    ]
