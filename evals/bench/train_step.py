"""Time, memory and MFU of whole training steps on one device: engine, clipping and optimizer included.

Takes the model, micro-batch, ZeRO stage and recomputation of a phase's JSON, fills the batches with random tokens (one
document per row) and runs real updates of the DeepSpeed engine. MFU counts the operations of train/flops.py: sparse
attention by its own pairs, recomputation not at all. Phases whose steps are partly full are timed both ways. Writes
NAME.json, NAME being the phase's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError, positive_int, print_table, write_json

if TYPE_CHECKING:
    from neomoba_dist.config import BatchPlan, Config
    from neomoba_dist.data.batch import Batch
    from neomoba_dist.train.engine import Engine

# dense bf16 TFLOP/s of the maker's data sheet
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


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
    parser.add_argument("--steps", type=positive_int, default=3, metavar="N", help="timed updates (default: 3)")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="of the device, for MFU (default: known for H200, H100, A100)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the result")


def read_config(args: argparse.Namespace) -> tuple[Config, BatchPlan]:
    """The phase with updates of --micro-batches on a world of one. Raises ConfigError, EvalError."""
    from neomoba_dist.config import load_config

    config = load_config(args.ds_config, args.set)
    tokens = args.micro_batches * config.micro_batch_size * config.phase.sequence_length
    axes = [f"neomoba.parallel.{axis}_parallel_size=1" for axis in ("tensor_model", "pipeline_model", "context")]
    config = load_config(args.ds_config, [*args.set, *axes, f"neomoba.phase.tokens_per_update={tokens}"])
    return config, config.plan(1)


def random_batches(config: Config, plan: BatchPlan) -> list[Batch]:
    """The micro-batches of one update: rows of one document, labels as the objective has them."""
    import torch

    from neomoba_dist.data.batch import IGNORE_LABEL, Batch
    from neomoba_dist.data.build import max_documents

    generator, length = torch.Generator().manual_seed(0), config.phase.sequence_length
    rows, batches = plan.micro_batch_size, []
    borders = (torch.arange(max_documents(config.data, rows) + 1) * length).clamp(max=rows * length)
    for _ in range(plan.gradient_accumulation_steps):
        tokens = torch.randint(0, config.model.vocab_size, (rows * length,), generator=generator)
        labels = tokens.roll(-1)
        if config.model.objective == "mlm":
            kept = torch.rand(tokens.shape, generator=generator) < config.data.mlm_probability
            labels = torch.where(kept, tokens, IGNORE_LABEL)
        batches.append((tokens, labels))
    counted = sum(int((labels != IGNORE_LABEL).sum()) for _, labels in batches)
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
    tokens = sum(batch.input_ids.numel() for batch in batches)
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    flops, best = step_flops(config.model, lengths, batches[0].num_valid, full), min(seconds[1:])
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


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    config, plan = read_config(args)
    try:
        from neomoba_dist.train.engine import build_engine
    except ImportError as error:
        raise EvalError(f"training steps need DeepSpeed ({error}); install requirements.txt") from error
    import torch

    from neomoba_dist.parallel.launcher import initialize_process_group, map_launcher_environment
    from neomoba_dist.parallel.mesh import Mesh

    map_launcher_environment()
    mesh = Mesh.build(config.parallel, initialize_process_group())
    engine = build_engine(config, plan, mesh)
    machine = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    peak = args.peak_tflops or next((peak for name, peak in PEAKS.items() if name in machine), None)
    batches, fraction, rows = random_batches(config, plan), config.phase.full_attention_fraction, []
    for full in [False, True] if 0 < fraction < 1 else [fraction == 1]:
        row = measure(engine, batches, config, full, args.steps)
        rows.append({"phase": config.phase.name, **row, "mfu": row["tflops"] / peak if peak else None})
    print_table([HEADER, *(_cells(row) for row in rows)])
    if args.output is not None:
        result = {"machine": machine, "torch": torch.__version__, "peak_tflops": peak, "rows": rows}
        write_json(args.output, config.phase.name, result)
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
