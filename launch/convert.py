"""Look into checkpoints and merge them, in one process and without the job that wrote them.

python launch/convert.py runs/mine --info
python launch/convert.py runs/mine --verify
python launch/convert.py runs/mine --diff runs/other
python launch/convert.py runs/mine --merge weights/
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line: a checkpoint and one thing to do with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR", help="run folder (its newest checkpoint), or a step_N folder")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", action="store_true", help="step, layout, tensors and sizes")
    action.add_argument("--verify", action="store_true", help="hold every file against its checksum")
    action.add_argument("--diff", metavar="DIR", help="largest difference of every tensor; exit code 1 if any")
    action.add_argument("--merge", metavar="DIR", help="write the weights to a new folder, in their whole shapes")
    return parser.parse_args(arguments)


def convert(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code. Raises CheckpointError or ConfigError, each one line."""
    from neomoba_dist.checkpoint.convert import describe, differences, merge
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.checkpoint.verify import find_damage

    reader = CheckpointReader(arguments.checkpoint)
    if arguments.info:
        print(describe(reader))
    elif arguments.verify:
        if problem := find_damage(reader.folder):
            raise CheckpointError(problem)
        known = "all files are there (version 1 has no checksums)" if reader.index["version"] == 1 else "whole"
        print(f"{reader.folder}: {known}")
    elif arguments.diff is not None:
        apart = False
        for name, largest, problem in differences(reader, CheckpointReader(arguments.diff)):
            print(f"{name}: {problem or f'{largest:.3e}'}")
            apart |= largest > 0
        return int(apart)
    else:
        for file in merge(reader, Path(arguments.merge)):
            print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def main(command_line: list[str]) -> int:
    """Returns the exit code: 0, or 1 after one line on what is wrong."""
    arguments = parse_arguments(command_line)
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.config import ConfigError

    try:
        return convert(arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
