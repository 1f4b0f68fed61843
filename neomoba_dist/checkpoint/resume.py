"""Which checkpoint a run goes on from: the newest whole one, the same for all ranks, and a word on those refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

from neomoba_dist.checkpoint.layout import KINDS, CheckpointError, complete_checkpoints, find_checkpoint
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.parallel.comm import all_gather_objects
from neomoba_dist.parallel.mesh import Mesh


def check_resume(output: Path, resume: str) -> bool:
    """Whether there is something to resume; what the file names alone can refuse, before any process group exists.

    resume: "auto" (the newest, if any), "must", "none", or a folder. Raises CheckpointError where "must" finds none,
    where "none" would overwrite a run, and where the folder holds none.
    """
    found = complete_checkpoints(output)
    if resume == "none":
        if found or (output / "metrics.jsonl").exists():
            raise CheckpointError(f"{output}: holds a run already; give another --output_dir, or --resume auto")
        return False
    if resume == "must" and not found:
        raise CheckpointError(f"{output}: no checkpoint to resume from; start with --resume auto or name a folder")
    if resume not in ("auto", "must"):
        find_checkpoint(Path(resume))
        return True
    return bool(found)


def choose_checkpoint(output: Path, resume: str, mesh: Mesh, say: Callable[[str], None]) -> CheckpointReader:
    """What `check_resume` has found, read once by all ranks together and whole; the same on every rank.

    say: told of every newer checkpoint that is refused. Collective over the world. Raises CheckpointError where none
    is whole: to start anew would lose the run without a word.
    """
    if resume not in ("auto", "must"):
        folder = require_whole(Path(resume), mesh)
        return CheckpointReader(folder)
    names = all_gather_objects([path.name for path in complete_checkpoints(output)], mesh, "world")[0]
    for name in reversed(names):
        folder = output / "checkpoints" / name
        problem = find_damage_together(folder, mesh)
        if problem is None:
            return CheckpointReader(folder)
        say(f"warning: {folder} is not used: {problem}")
    raise CheckpointError(
        f"{output}: none of its {len(names)} checkpoints is whole; move checkpoints/ away to start anew, or copy a "
        "whole one back"
    )


def require_whole(path: Path, mesh: Mesh, kinds: Sequence[str] = KINDS) -> Path:
    """The checkpoint at `path` (its own or a run's folder), if all ranks find it whole. Raises CheckpointError."""
    seen = all_gather_objects(str(find_checkpoint(path)), mesh, "world")
    if len(set(seen)) > 1:
        raise CheckpointError(f"{path}: the ranks see different checkpoints ({', '.join(sorted(set(seen)))}); name one")
    folder = Path(seen[0])
    if problem := find_damage_together(folder, mesh, kinds):
        raise CheckpointError(f"{problem}; the checkpoint is damaged, use another one")
    return folder


def find_damage_together(folder: Path, mesh: Mesh, kinds: Sequence[str] = KINDS) -> str | None:
    """`find_damage` by all ranks, each its share of the files; the same answer on all of them."""
    found = find_damage(folder, kinds, (mesh.rank, mesh["world"].size))
    return next((problem for problem in all_gather_objects(found, mesh, "world") if problem), None)
