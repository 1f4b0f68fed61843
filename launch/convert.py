"""Look into checkpoints, merge, translate and foretell them, in one process and without the job that writes them.

python launch/convert.py runs/mine --info
python launch/convert.py runs/mine --verify
python launch/convert.py runs/mine --diff runs/other
python launch/convert.py runs/mine --merge weights/
python launch/convert.py --from hf --input Qwen3-0.6B --output runs/qwen3
python launch/convert.py --to hf --input runs/mine --output mine_hf --dtype bfloat16
python launch/convert.py ds_configs/phase3.json --plan --world_size 8 64
python launch/convert.py --plan
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files

from neomoba_dist.errors import FAILED, FailedError, exit_code_of


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line: a checkpoint and one thing to do with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subject",
        nargs="?",
        metavar="DIR|FILE",
        help="run folder (its newest checkpoint) or step_N folder; of --plan: a JSON of ds_configs/ (default: 1B, 7B "
        "and 70B parameters on 8 to 1,024 ranks)",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", action="store_true", help="step, layout, tensors and sizes")
    action.add_argument("--verify", action="store_true", help="hold every file against its checksum")
    action.add_argument("--diff", metavar="DIR", help="largest difference of every tensor; exit code 1 if any")
    action.add_argument("--merge", metavar="DIR", help="write the weights to a new folder, in their whole shapes")
    action.add_argument("--from", dest="origin", choices=["hf"], help="read --input, a folder of the hub, into a run")
    action.add_argument(
        "--to", dest="target", choices=["hf"], help="write --input, a checkpoint, as a folder of the hub"
    )
    action.add_argument("--plan", action="store_true", help="bytes, files and seconds of save and load on many ranks")
    other = parser.add_argument_group("of --from and --to")
    other.add_argument("--input", metavar="DIR", help="the same as DIR")
    other.add_argument("--output", metavar="DIR", help="new folder")
    other.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of --to")
    other.add_argument("--tokenizer", metavar="DIR", help="of --to (default: the one that the run was trained with)")
    plan = parser.add_argument_group("of --plan")
    plan.add_argument("--world_size", type=int, nargs="+", default=[8], metavar="N", help="numbers of ranks")
    plan.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE")
    for flag, default, what in RATES:
        plan.add_argument(
            f"--{flag}", type=float, default=default, metavar="GB/S", help=f"{what} (default: {default:g})"
        )
    found = parser.parse_args(arguments)
    found.subject = found.input or found.subject
    return found


RATES = (
    ("machine_rate", 5.0, "of the disk to and from one machine of 8 ranks"),
    ("disk_rate", 100.0, "of the whole disk"),
    ("bus_rate", 20.0, "from a GPU to host memory"),
)


def plan(arguments: argparse.Namespace) -> None:
    """Print the table of --plan. Raises ConfigError."""
    from neomoba_dist.config import load_config
    from neomoba_dist.train import checkpoint_plan

    rates = checkpoint_plan.Rates(*(getattr(arguments, flag) for flag, *_ in RATES))
    rows = checkpoint_plan.standard_rows()
    if arguments.subject:
        config = load_config(arguments.subject, arguments.set)
        rows = ((config.phase.name, config, world) for world in arguments.world_size)
    print(
        f"GB = 10^9 bytes; {rates.machine:g} GB/s per machine of {rates.ranks_per_machine} ranks, {rates.disk:g} GB/s "
        f"over all, {rates.bus:g} GB/s from GPU to host"
    )
    print(checkpoint_plan.HEADER)
    for name, config, world in rows:
        print(checkpoint_plan.row(name, config, world, rates), flush=True)


def translate(arguments: argparse.Namespace) -> None:
    """--from and --to. Raises CheckpointError."""
    import torch

    from neomoba_dist.checkpoint.hf import HuggingFaceReader, export_folder, import_folder
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.checkpoint.tokenizer import chat_template_of, tokenizer_of
    from neomoba_dist.data.tokenizer import load_tokenizer

    if arguments.output is None:
        raise CheckpointError("no --output given; name a new folder")
    if arguments.target:
        source = CheckpointReader(arguments.subject)
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else tokenizer_of(source)
        if tokenizer is None:
            print("warning: no tokenizer found, and none written; name its folder with --tokenizer", file=sys.stderr)
        template = None if tokenizer is None else chat_template_of(source, tokenizer, arguments.tokenizer)
        dtype = getattr(torch, arguments.dtype)
        print(export_folder(source, Path(arguments.output), dtype, tokenizer, template=template))
        return
    reader = HuggingFaceReader(arguments.subject)
    for name in reader.left_out():
        print(f"warning: {name} has no counterpart and is left out", file=sys.stderr)
    print(import_folder(reader, Path(arguments.output)))


def convert(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code. Raises CheckpointError or ConfigError, each one line."""
    from neomoba_dist.checkpoint.convert import describe, differences, merge
    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.checkpoint.verify import find_damage

    if arguments.plan:
        plan(arguments)
        return 0
    if arguments.subject is None:
        raise CheckpointError("no checkpoint given; name a run folder or a step_N folder")
    if arguments.origin or arguments.target:
        translate(arguments)
        return 0
    reader = open_checkpoint(arguments.subject)
    if arguments.info:
        print(describe(reader))
    elif arguments.verify:
        if problem := find_damage(reader.folder):
            raise FailedError(problem)
        known = "all files are there (version 1 has no checksums)" if reader.index["version"] == 1 else "whole"
        print(f"{reader.folder}: {known}")
    elif arguments.diff is not None:
        apart = False
        for name, largest, problem in differences(reader, open_checkpoint(arguments.diff)):
            print(f"{name}: {problem or f'{largest:.3e}'}")
            apart |= largest > 0
        return FAILED if apart else 0
    else:
        for file in merge(reader, Path(arguments.merge)):
            print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(command_line)
    return exit_code_of(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
