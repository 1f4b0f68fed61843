"""Train one phase.

    deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/phase3.json

Also runs under torchrun, srun and mpirun, and as plain `python` in one process. Everything that can be wrong with the
configuration, the layout or the corpus is said in one line before any process group is built.
"""

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # under a launcher only launch/ is on the path

from neomoba_dist.config import Config, ConfigError, load_config
from neomoba_dist.config.paths import folder_problem


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; flags may be written with `-` or `_`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **settings: object) -> None:
        spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        parser.add_argument(*spellings, **settings)  # type: ignore[arg-type]

    add("ds_config", required=True, metavar="FILE", help="JSON with DeepSpeed's keys and a neomoba block")
    add("set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON")
    add("output_dir", metavar="DIR", help="run folder (default: runs/<neomoba.phase.name>)")
    add("max_steps", type=int, metavar="N", help="stop after step N; the schedule stays that of neomoba.phase.steps")
    add("resume", default="auto", metavar="auto|must|none|DIR", help="go on from a checkpoint (default: auto)")
    add("init_from", metavar="DIR", help="start from the weights of another phase's run or checkpoint")
    add("allow_data_change", action="store_true", help="resume although neomoba.data gives other rows than before")
    add("upcycle", action="store_true", help="--init_from is a dense model: copy its layers into the experts")
    add("profile", action="store_true", help="write a torch trace and a memory snapshot of a few steps")
    add("dry_run", action="store_true", help="print the resolved config, the rank map and the batch, then exit")
    add("world_size", type=int, metavar="N", help="number of ranks of --dry_run (default: this launch's)")
    add("local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(arguments)


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


def train(arguments: argparse.Namespace, config: Config, world_size: int) -> None:
    """Everything from the checks to the last checkpoint, in one process of the launch."""
    from neomoba_dist.checkpoint.layout import KINDS, CheckpointError
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.checkpoint.resume import check_resume, choose_checkpoint, require_whole
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
    resumed = start = None
    if arguments.init_from and not resumes:
        path = arguments.init_from
        start = UpcycledReader(path, config) if arguments.upcycle else CheckpointReader(path)
    build_stream(config, plan, corpora.train, dp_rank=0)  # refuses too small a corpus before the ranks meet

    from neomoba_dist.train.engine import build_engine
    from neomoba_dist.train.trainer import Trainer

    device = initialize_process_group()
    mesh = Mesh.build(config.parallel, device, num_key_value_heads=config.model.num_key_value_heads)
    if mesh.rank == 0 and world_size > 1:
        from neomoba_dist.parallel.mesh import rank_map

        print(rank_map(config.parallel, world_size))
    if len(set(all_gather_objects(resumes, mesh, "world"))) > 1:
        raise CheckpointError(f"{output}: only some ranks see checkpoints here; put it on a disk that all machines see")
    if resumes:
        resumed = choose_checkpoint(output, arguments.resume, mesh, print if mesh.rank == 0 else lambda line: None)
    elif start:
        require_whole(start.folder, mesh, KINDS[:1])
    if resumed and (step := resumed.index["step"]) >= last_step:
        if mesh.rank == 0:
            key = "neomoba.phase.steps" if last_step == config.phase.steps else "--max_steps"
            print(f"{output}: at step {step} of {last_step}, nothing to do; raise {key} to go on", flush=True)
        return
    engine = build_engine(config, plan, mesh)
    stream = build_stream(config, plan, corpora.train, mesh["dp"].index, mesh)
    validation = build_validation(config, plan, corpora.validation, mesh["dp"].index)
    trainer = Trainer(config, mesh, engine, stream, validation, output)
    if resumed:
        trainer.resume(resumed, allow_data_change=arguments.allow_data_change)
    elif start:
        trainer.start_from(start)
    if mesh.rank == 0:
        print("\n".join(corpora.lines()))
        origin = resumed.folder if resumed else start.folder if start else None
        if start and arguments.upcycle and (warning := difference(config.model)):
            print(warning)
        print(f"{output}: from {origin or 'new weights'}, steps {trainer.step + 1} to {last_step}", flush=True)
    trainer.run(last_step, profile=arguments.profile)


def main(command_line: list[str]) -> int:
    """Returns the exit code: 0, or 1 after one line on what is wrong."""
    arguments = parse_arguments(command_line)
    speaks = True
    try:
        config = load_config(arguments.ds_config, arguments.set)
        if arguments.upcycle and not arguments.init_from:
            raise ConfigError("--upcycle needs a dense run or checkpoint; name it with --init_from")
        for flag in ("max_steps", "world_size"):
            if (value := getattr(arguments, flag)) is not None and value < 1:
                raise ConfigError(f"--{flag} is {value}; give at least 1")
        if arguments.dry_run:
            dry_run(config, arguments.world_size or int(os.environ.get("WORLD_SIZE", "1")))
            return 0
        from neomoba_dist.parallel.launcher import map_launcher_environment

        rank, world_size = map_launcher_environment()
        speaks = os.environ["LOCAL_RANK"] == "0"  # all ranks find the same: one line per machine is enough
        logging.basicConfig(format="%(message)s")
        logging.getLogger("neomoba_dist").setLevel(logging.INFO if rank == 0 else logging.WARNING)
        faulthandler.register(signal.SIGUSR1)  # `kill -USR1` shows where a rank hangs
        train(arguments, config, world_size)
    except Exception as error:
        if not isinstance(error, _user_errors()):
            traceback.print_exc()  # not raised: only `leave` ends the process without waiting for the other ranks
        elif speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif _ranks_have_met():  # from here on a rank may be the only one that knows
            print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _ranks_have_met() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is the whole story for the person at the keyboard; their modules load late."""
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.data.errors import DataError
    from neomoba_dist.parallel.ledger import CommunicationError

    errors: tuple[type[Exception], ...] = (ConfigError, DataError, CheckpointError, CommunicationError)
    trainer = sys.modules.get("neomoba_dist.train.trainer")
    return (*errors, trainer.TrainingError) if trainer else errors


def leave(code: int) -> None:
    """End the process once all ranks are done.

    Leaving through the interpreter's teardown aborts now and then ("terminate called without an active exception"),
    because gloo's threads outlive their objects.
    """
    if code == 0 and _ranks_have_met():
        dist = sys.modules["torch.distributed"]
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
