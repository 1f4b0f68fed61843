"""Train a student by a teacher: smaller, and on the tokens that the teacher knows.

    deepspeed --num_gpus 8 launch/distill.py --ds_config ds_configs/distill.json --teacher runs/phase3

The teacher is a run or checkpoint of any layout, or a folder of the Hugging Face hub; it is frozen, and lies on the
ranks of the student. Everything else is as with launch/pretrain.py, whose loop this is.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # under a launcher only launch/ is on the path

from launch import pretrain
from launch.pretrain import leave, run, training_parser
from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.config.distill import as_teacher, teacher_problems
from neomoba_dist.config.rules import check_rules

if TYPE_CHECKING:
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train.engine import Engine


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser, add = training_parser(__doc__)
    add(
        "teacher", metavar="DIR", help="instead of neomoba.distill.teacher: a run or checkpoint, or a folder of the hub"
    )
    return parser.parse_args(arguments)


def load(arguments: argparse.Namespace) -> Config:
    """The student's configuration, held against the teacher. Raises ConfigError and CheckpointError."""
    from neomoba_dist.checkpoint.hf import open_checkpoint

    if arguments.teacher:
        arguments.set = [*arguments.set, f"neomoba.distill.teacher={arguments.teacher}"]
    config = pretrain.resolve(arguments)
    if config.distill.teacher is None:
        raise ConfigError("no teacher given; name its run or checkpoint with --teacher")
    source = f"--teacher {config.distill.teacher}"
    teacher = open_checkpoint(config.distill.teacher).config.model
    for problem in teacher_problems(config, teacher):
        raise ConfigError(f"{source}: {problem}")
    check_rules(as_teacher(config, teacher, source))
    return config


def require_same_tokenizer(config: Config, teacher: "CheckpointReader") -> None:
    """Refuse a teacher of other tokens than the student's corpora hold, where its tokenizer is still at hand. Raises
    ConfigError and DataError."""
    from neomoba_dist.checkpoint.tokenizer import tokenizer_of
    from neomoba_dist.train.assemble import open_corpora

    corpora = open_corpora(config)
    theirs = tokenizer_of(teacher)
    if theirs is None:
        return
    for source in corpora.train:
        entry = source.corpus.index.tokenizer
        if entry.sha256 != theirs.sha256:
            raise ConfigError(
                f"--teacher {teacher.folder}: its tokenizer (sha256 {theirs.sha256[:12]}) is not that of "
                f"{source.corpus.name} (sha256 {entry.sha256[:12]}); tokenize the text with the teacher's"
            )


def train(arguments: argparse.Namespace, config: Config, world_size: int) -> int:
    """As in pretraining, with the engine of a student."""
    from neomoba_dist.checkpoint.hf import open_checkpoint

    assert config.distill.teacher is not None
    require_same_tokenizer(config, open_checkpoint(config.distill.teacher))

    def build(config: Config, plan: BatchPlan, mesh: "Mesh") -> "Engine":
        from neomoba_dist.train.distill import build_distill_engine

        assert config.distill.teacher is not None
        teacher = open_checkpoint(config.distill.teacher)
        engine = build_distill_engine(config, plan, mesh, teacher)
        if mesh.rank == 0:
            print(f"taught by {teacher.folder}")
        return engine

    return pretrain.train(arguments, config, world_size, build)


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    return run(parse_arguments(command_line), load, train)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
