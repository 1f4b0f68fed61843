"""Find machines that compute wrongly or more slowly than the others, before a run waits for them at every step.

    srun python launch/check_hosts.py

Also runs under deepspeed, torchrun and mpirun. A line per host; exit code 1 where one is to be left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # under a launcher only launch/ is on the path

from launch.pretrain import leave
from neomoba_dist.errors import FAILED, exit_code_of


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, metavar="N", help="of the matrices (default: 8192 on a GPU, else 1024)")
    parser.add_argument("--megabytes", type=int, metavar="N", help="of the all-reduce (default: 256 on a GPU, else 16)")
    parser.add_argument(
        "--tolerance", type=float, default=1.5, metavar="X", help="times slower than the median host (default: 1.5)"
    )
    parser.add_argument("--bad_hosts", type=Path, metavar="FILE", help="where to write the names of hosts to leave out")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(arguments)


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(command_line)
    return exit_code_of(lambda: check(arguments))


def check(arguments: argparse.Namespace) -> int:
    """Measure together with all other ranks; FAILED where a host is to be left out."""
    from neomoba_dist.parallel.host_check import measure, problems
    from neomoba_dist.parallel.launcher import initialize_process_group, map_launcher_environment

    rank, _ = map_launcher_environment()
    device = initialize_process_group(timeout_minutes=5)
    size, megabytes = (8192, 256) if device.type == "cuda" else (1024, 16)
    speeds = measure(device, arguments.size or size, arguments.megabytes or megabytes)
    found = problems(speeds, arguments.tolerance)
    if rank == 0:
        for host in dict.fromkeys(speed.host for speed in speeds):
            own = [speed for speed in speeds if speed.host == host]
            reduce = f"{own[0].reduce:.3g} GB/s" if own[0].reduce else "one rank"
            product = min(speed.product for speed in own)
            print(
                f"{host}: {len(own)} of {len(speeds)} ranks, slowest product {product:.3g} TFLOP/s, "
                f"all-reduce {reduce}; {'; '.join(found.get(host, ['sound']))}"
            )
        if found and arguments.bad_hosts:
            arguments.bad_hosts.write_text("".join(f"{host}\n" for host in found))
    if found and rank == 0:
        print(f"error: leave out {', '.join(found)}", file=sys.stderr)
    return FAILED if found else 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
