"""Prune a model and run it in int8, for inference on a CPU: what it costs in loss, and what it gains.

    python launch/compress.py --checkpoint runs/student --prune 0.5 --int8 --output runs/student_pruned
    python launch/compress.py --checkpoint runs/student --int8 --json

Each matrix of the blocks loses the smallest --prune of its weights; the pruned model is written as a run folder that
every other command reads. --int8 measures the projections of both in int8 (torchao); nothing of it is written. Losses
are those of the run's validation rows, speeds those of the same rows in one process, the models taking turns.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files

from launch.pretrain import command_parser
from neomoba_dist.config import ConfigError
from neomoba_dist.errors import exit_code_of

if TYPE_CHECKING:
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.data.batch import Batch
    from neomoba_dist.model.neobert import NeoBERT

HEADER = ("model", "validation loss", "difference", "tokens/s", "ratio", "MB", "zeros")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; flags may be written with `-` or `_`."""
    parser, add = command_parser(__doc__)
    add("checkpoint", required=True, metavar="DIR", help="run folder or step_N folder, or a folder of the hub")
    add("prune", type=float, metavar="SHARE", help="of every matrix's weights, the smallest, that become zero")
    add("int8", action="store_true", help="measure the model, and the pruned one, in int8 too")
    add("output", metavar="DIR", help="new folder for the pruned model")
    add("data", metavar="DIR", help="corpus to measure on (default: neomoba.data.validation of the run)")
    add("rows", type=int, default=64, metavar="N", help="of the corpus (default: 64)")
    add("repeats", type=int, default=3, metavar="N", help="passes of each model, of which the fastest counts")
    add("json", action="store_true", help="print everything as JSON")
    found = parser.parse_args(arguments)
    for flag in ("rows", "repeats"):
        if getattr(found, flag) < 1:
            parser.error(f"--{flag} is {getattr(found, flag)}; give at least 1")
    return found


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError in one line."""
    if arguments.prune is None and not arguments.int8:
        raise ConfigError("nothing to do; give --prune SHARE, --int8, or both")
    if arguments.prune is not None and not 0 < arguments.prune < 1:
        raise ConfigError(f"--prune is {arguments.prune:g}; give a share between 0 and 1, such as 0.5")
    if (arguments.prune is None) != (arguments.output is None):
        raise ConfigError("--prune and --output belong together; name a new folder for the pruned model with --output")


def validation_rows(reader: "CheckpointReader", data: str | None, rows: int) -> "list[Batch]":
    """The rows that the run's validations begin with, one to a batch. Raises ConfigError and DataError."""
    from neomoba_dist.data.corpus import read_corpus
    from neomoba_dist.data.validation import validation_batches

    config = reader.config
    if config.model.num_decoder_layers:
        raise ConfigError(f"{reader.folder}: of an encoder-decoder, which is not compressed; give another run")
    location = data or config.data.validation
    if location is None:
        raise ConfigError(f"{reader.folder}: its run had no validation corpus; name one with --data")
    corpus = read_corpus(location, "--data" if data else "neomoba.data.validation", None)
    corpus.require_vocabulary(config.model.vocab_size)
    return validation_batches(
        corpus,
        config.data,
        objective=config.model.objective,
        sequence_length=config.phase.sequence_length,
        micro_batch_size=1,
        rows=rows,
    )


def open_model(reader: "CheckpointReader", int8: bool) -> "NeoBERT":
    """The model in one process, in float32 but for int8 projections; its attention is that of the run's validation."""
    from neomoba_dist.checkpoint.load import load_weights
    from neomoba_dist.model.attention.layer import set_full_attention
    from neomoba_dist.model.int8 import quantize_projections
    from neomoba_dist.model.neobert import NeoBERT
    from neomoba_dist.parallel.mesh import Mesh

    config = reader.config
    model = NeoBERT(config.model, Mesh.single()).eval()
    load_weights(reader, model)
    set_full_attention(model, config.phase.full_attention_fraction == 1.0)
    if int8:
        quantize_projections(model)
    return model


def measure(models: "dict[str, NeoBERT]", batches: "list[Batch]", repeats: int) -> dict[str, dict[str, Any]]:
    """By model its mean loss over the labels, tokens per second, bytes of its weights and how many of them are zero."""
    import torch

    from neomoba_dist.model.int8 import num_bytes

    counted = sum(batch.local_valid() for batch in batches)
    tokens = sum(len(batch.input_ids) for batch in batches)
    losses: dict[str, float] = {}
    seconds = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for _ in range(repeats):
            for name, model in models.items():
                start = time.perf_counter()
                losses[name] = sum(float(model(batch)[0]) for batch in batches) / counted
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {
        name: {
            "validation_loss": losses[name],
            "tokens_per_second": tokens / seconds[name],
            "bytes": sum(num_bytes(weight) for weight in model.parameters()),
        }
        for name, model in models.items()
    }


def compress(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command does and finds. Raises errors that are one line each."""
    import torch

    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.checkpoint.prune import count_zeros, prune_checkpoint
    from neomoba_dist.checkpoint.tokenizer import tokenizer_of
    from neomoba_dist.checkpoint.verify import refuse_damage

    check(arguments)
    reader = open_checkpoint(arguments.checkpoint)
    if reader.has_checksums:
        refuse_damage(reader.folder, ("model",))
    batches = validation_rows(reader, arguments.data, arguments.rows)
    readers = {"float32": reader}
    if arguments.prune is not None:
        output = Path(arguments.output)
        pruned = prune_checkpoint(reader, output, arguments.prune)
        if tokenizer := tokenizer_of(reader):
            tokenizer.save(output)
        readers["pruned"] = CheckpointReader(pruned)
    models = {name: open_model(reader, False) for name, reader in readers.items()}
    if arguments.int8:
        models |= {("int8", "pruned int8")[i]: open_model(reader, True) for i, reader in enumerate(readers.values())}
    found = measure(models, batches, arguments.repeats)
    base = found["float32"]
    for name, entry in found.items():
        entry["loss_difference"] = entry["validation_loss"] - base["validation_loss"]
        entry["speed_ratio"] = entry["tokens_per_second"] / base["tokens_per_second"]
        entry["zeros"] = count_zeros(readers["pruned" if "pruned" in name else "float32"])
    return {
        "checkpoint": str(reader.folder),
        "output": arguments.output,
        "prune": arguments.prune,
        "rows": len(batches),
        "sequence_length": reader.config.phase.sequence_length,
        "threads": torch.get_num_threads(),
        "models": found,
    }


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [HEADER]
    for name, entry in found["models"].items():
        lines.append(
            (
                name,
                f"{entry['validation_loss']:.4f}",
                f"{entry['loss_difference']:+.4f}",
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['speed_ratio']:.2f}",
                f"{entry['bytes'] / 1e6:.2f}",
                f"{entry['zeros']:.1%}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(command_line)
    return exit_code_of(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> int:
    """Compress, then print and write what came of it."""
    found = compress(arguments)
    if arguments.output:
        (Path(arguments.output) / "compress.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
