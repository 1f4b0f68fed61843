"""Train one phase.

    deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/phase3.json

Also runs under torchrun, srun and mpirun, and as plain `python` in one process. Everything that can be wrong with the
configuration, the layout or the corpus is said in one line before any model is built.
"""

import argparse
import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # under a launcher only launch/ is on the path

from neomoba_dist.config import BatchPlan, Config, ConfigError, load_config
from neomoba_dist.config.load import read_json, read_tree
from neomoba_dist.config.paths import folder_problem
from neomoba_dist.errors import FAILED, INTERRUPTED, MISTAKE, UserError

if TYPE_CHECKING:
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train.engine import Engine

Add = Callable[..., None]
EngineBuilder = Callable[[Config, BatchPlan, "Mesh"], "Engine"]


def command_parser(about: str | None) -> tuple[argparse.ArgumentParser, Add]:
    """A parser, and a function that adds a flag to it, which may be written with `-` or `_`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **settings: Any) -> None:
        spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        parser.add_argument(*spellings, **settings)

    return parser, add


def shared_parser(about: str | None) -> tuple[argparse.ArgumentParser, Add]:
    """The flags of every command that trains, and a function that adds more."""
    parser, add = command_parser(about)
    add("ds_config", required=True, metavar="FILE", help="JSON with DeepSpeed's keys and a neomoba block")
    add("set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON")
    add("output_dir", metavar="DIR", help="run folder (default: runs/<neomoba.phase.name>)")
    add("max_steps", type=int, metavar="N", help="stop after step N; the schedule stays that of neomoba.phase.steps")
    add("resume", default="auto", metavar="auto|must|none|DIR", help="go on from a checkpoint (default: auto)")
    add("dry_run", action="store_true", help="print the resolved config, the rank map and the batch, then exit")
    add("world_size", type=int, metavar="N", help="number of ranks of --dry_run; any other launch is refused")
    add("quiet", action="store_true", help="warnings and errors only; every step is in the run folder's metrics.jsonl")
    add("verbose", action="store_true", help="what every rank logs, not the first one's alone, with its number")
    add("local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser, add


def training_parser(about: str | None) -> tuple[argparse.ArgumentParser, Add]:
    """The flags of commands that train on rows of a corpus, and a function that adds more."""
    parser, add = shared_parser(about)
    add("init_from", metavar="DIR", help="start from the weights of another phase's run or checkpoint")
    add("allow_data_change", action="store_true", help="resume although neomoba.data gives other rows than before")
    add("upcycle", action="store_true", help="--init_from is a dense model: copy its layers into the experts")
    add("profile", action="store_true", help="write a torch trace and a memory snapshot of a few steps")
    return parser, add


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    return training_parser(__doc__)[0].parse_args(arguments)


def dry_run(config: Config, world_size: int) -> None:
    """Print what a launch on `world_size` ranks would do. Raises ConfigError where it would not start."""
    plan = config.plan(world_size)
    from neomoba_dist.parallel.mesh import rank_map

    phase = config.phase
    print(json.dumps(config.to_dict(), indent=2))
    print(rank_map(config.parallel, world_size))
    print(
        f"update of {plan.tokens_per_update:,} tokens = {plan.rows_per_update} rows x {phase.sequence_length} tokens; "
        f"rows = micro-batch {plan.micro_batch_size} x accumulation {plan.gradient_accumulation_steps} x dp "
        f"{plan.data_parallel_size}\n"
        f"{phase.steps:,} steps = {phase.steps * plan.tokens_per_update:,} tokens"
    )
    if config.parallel.context_parallel_size > 1:
        from neomoba_dist.parallel.context_cost import describe

        print(describe(config))


UNLIKE = ("local_rank", "ds_config", "set")  # flags that ranks may have differently: what the last two say is compared
REFUSED = "REFUSED"  # file in --output_dir beside the exit code MISTAKE, which launchers do not pass on reliably


def train(arguments: argparse.Namespace, config: Config, world_size: int, build: "EngineBuilder | None" = None) -> int:
    """Everything from the checks to the last checkpoint, in one process of the launch; returns the exit code.

    build: another engine than the layout's own.
    """
    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.checkpoint.resume import Candidates, check_resume, require_whole_weights
    from neomoba_dist.checkpoint.upcycle import UpcycledReader, difference
    from neomoba_dist.parallel.comm import all_gather_objects
    from neomoba_dist.parallel.launcher import initialize_process_group
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train.assemble import build_stream, build_validation, open_corpora

    plan = config.plan(world_size)
    output = Path(arguments.output_dir or Path("runs") / config.phase.name)
    last_step = config.phase.steps if arguments.max_steps is None else min(arguments.max_steps, config.phase.steps)
    for folder in (output, output / "checkpoints"):
        if problem := folder_problem(folder):
            raise ConfigError(f"--output_dir {output}: {problem}; give a folder of your own that can be written")
    corpora = open_corpora(config)
    resumes = check_resume(output, arguments.resume)
    candidates = start = None
    if arguments.init_from and not resumes:
        path = arguments.init_from
        start = UpcycledReader(path, config) if arguments.upcycle else open_checkpoint(path)

    from neomoba_dist.train.engines import build_engine
    from neomoba_dist.train.guard import require_equal_start, versions
    from neomoba_dist.train.health import watched
    from neomoba_dist.train.memory import memory_explained
    from neomoba_dist.train.rehearsal import rehearse
    from neomoba_dist.train.trainer import Trainer

    device = initialize_process_group()
    words = {f"--{name}": value for name, value in vars(arguments).items() if name not in UNLIKE}
    require_equal_start({**config.to_dict(), **words, **corpora.fingerprints(), **versions()})
    started = time.perf_counter()
    mesh = Mesh.build(config.parallel, device, num_key_value_heads=config.model.num_key_value_heads)
    seconds = time.perf_counter() - started
    with watched(mesh, config.health, output / "stacks") as watchdog, memory_explained(config, mesh):
        if mesh.rank == 0:
            (output / REFUSED).unlink(missing_ok=True)
        if mesh.rank == 0 and world_size > 1:
            from neomoba_dist.parallel.mesh import rank_map

            print(rank_map(config.parallel, world_size))
            print(f"{mesh.num_groups} process groups in {seconds:.2f} s")
        corpora.check(mesh)
        stream = build_stream(config, plan, corpora.train, mesh["dp"].index, mesh)
        if len(set(all_gather_objects(resumes, mesh, "world"))) > 1:
            raise CheckpointError(
                f"{output}: only some ranks see checkpoints here; put it on a disk that all machines see"
            )
        if resumes:
            candidates = Candidates(output, arguments.resume, mesh, print if mesh.rank == 0 else lambda line: None)
        elif start:
            require_whole_weights(start, mesh, ())
        step = candidates.finished(last_step) if candidates else None
        if step is not None:
            if mesh.rank == 0:
                key = "neomoba.phase.steps" if last_step == config.phase.steps else "--max_steps"
                print(f"{output}: at step {step} of {last_step}, nothing to do; raise {key} to go on", flush=True)
            return 0
        engine = (build or build_engine)(config, plan, mesh)
        validation = build_validation(config, plan, corpora.validation, mesh)
        trainer = Trainer(config, mesh, engine, stream, validation, output, watchdog)
        origin = start
        if candidates:
            resume = functools.partial(trainer.resume, allow_data_change=arguments.allow_data_change)
            origin = candidates.load(resume)
        elif start:
            trainer.start_from(start)
        if mesh.rank == 0:
            print("\n".join(corpora.lines()))
            if start and arguments.upcycle and (warning := difference(config.model)):
                print(warning)
            weights = origin.folder if origin else "new weights"
            print(f"{output}: from {weights}, steps {trainer.step + 1} to {last_step}", flush=True)
        rehearse(engine)
        trainer.run(last_step, profile=arguments.profile)
        return INTERRUPTED if trainer.interrupted else 0


def load(arguments: argparse.Namespace) -> Config:
    """The configuration of a run of this command. Raises as `resolve`."""
    config = resolve(arguments)
    if config.distill.teacher is not None:
        raise ConfigError(f"{config.source}: has neomoba.distill.teacher; start it with launch/distill.py")
    return config


def resolve(arguments: argparse.Namespace) -> Config:
    """The configuration that the command line names; a file without neomoba.model is completed, see `network`. Raises
    ConfigError and CheckpointError."""
    ours = read_json(Path(arguments.ds_config)).get("neomoba")
    model = network(arguments) if isinstance(ours, dict) and "model" not in ours else None
    config = load_config(arguments.ds_config, arguments.set, model)
    if arguments.upcycle and not arguments.init_from:
        raise ConfigError("--upcycle needs a dense run or checkpoint; name it with --init_from")
    if config.finetune.tasks is not None:
        raise ConfigError(f"{config.source}: has neomoba.finetune.tasks; start it with launch/finetune.py")
    return config


def network(arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """neomoba.model of the run that goes on, which needs no more what it started from; else that of --init_from."""
    from neomoba_dist.checkpoint.layout import complete_checkpoints

    source = arguments.init_from
    if arguments.resume not in ("auto", "must", "none"):
        source = arguments.resume
    elif arguments.resume != "none":
        phase = read_tree(arguments.ds_config, arguments.set)["neomoba"].get("phase")
        name = phase.get("name") if isinstance(phase, dict) else None
        output = Path(arguments.output_dir or Path("runs") / str(name))
        if not folder_problem(output) and complete_checkpoints(output) and (output / "config.json").is_file():
            return vars(load_config(output / "config.json").model)
    if not source:
        return None
    from neomoba_dist.checkpoint.hf import open_checkpoint

    return open_checkpoint(source).index["config"]["neomoba"]["model"]


def run(
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], Config],
    train: Callable[[argparse.Namespace, Config, int], int],
) -> int:
    """What every command that trains does around `train`. Returns the exit code: 0, INTERRUPTED, or after one line on
    what is wrong MISTAKE or FAILED."""
    speaks = True
    try:
        config = load(arguments)
        for flag in ("max_steps", "world_size"):
            if (value := getattr(arguments, flag)) is not None and value < 1:
                raise ConfigError(f"--{flag} is {value}; give at least 1")
        if arguments.quiet and arguments.verbose:
            raise ConfigError("--quiet and --verbose: give one of them")
        if arguments.dry_run:
            dry_run(config, arguments.world_size or int(os.environ.get("WORLD_SIZE", "1")))
            return 0
        from neomoba_dist.parallel.launcher import map_launcher_environment

        rank, world_size = map_launcher_environment()
        if (asked := arguments.world_size) not in (None, world_size):
            raise ConfigError(
                f"--world_size {asked}, but the launcher started {world_size} ranks; start as many as asked"
            )
        speaks = os.environ["LOCAL_RANK"] == "0"  # all ranks find the same: one line per machine is enough
        start_talking(rank, arguments.quiet, arguments.verbose)
        faulthandler.register(signal.SIGUSR2)  # `kill -USR2` shows where a rank hangs
        return train(arguments, config, world_size)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # not raised: only `leave` ends the process without waiting for the other ranks
        elif speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif _ranks_have_met() and not error.on_all_ranks:  # a rank may be the only one that knows
            print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        if not _is_mistake(error):
            return FAILED
        if speaks and arguments.output_dir:
            with suppress(OSError):  # perhaps there is no such folder, and that is the mistake
                (Path(arguments.output_dir) / REFUSED).write_text(f"{error}\n")
        return MISTAKE


def start_talking(rank: int, quiet: bool, verbose: bool) -> None:
    """What this rank says from now on: warnings; by default also what the first one logs, and its line per step."""
    logging.basicConfig(format=f"rank {rank}: %(message)s" if verbose else "%(message)s")
    speaks = verbose or (rank == 0 and not quiet)
    logging.getLogger("neomoba_dist").setLevel(logging.INFO if speaks else logging.WARNING)
    if quiet:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process


def _is_mistake(error: Exception) -> bool:
    """Whether a second attempt is sure to fail alike, unlike what happens to one rank while all work together."""
    if not isinstance(error, UserError) or error.exit_code != MISTAKE:
        return False
    return isinstance(error, ConfigError) or error.on_all_ranks or not _ranks_have_met()


def _ranks_have_met() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def leave(code: int) -> None:
    """End the process once all ranks are done.

    Leaving through the interpreter's teardown aborts now and then ("terminate called without an active exception"),
    because gloo's threads outlive their objects.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _ranks_have_met():
        from neomoba_dist.parallel.launcher import leave_process_group

        if code in (0, INTERRUPTED):
            sys.modules["torch.distributed"].barrier()
        leave_process_group()
    os._exit(code)


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    return run(parse_arguments(command_line), load, train)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
