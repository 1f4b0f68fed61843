"""Which checkpoint a run goes on from: the newest whole one, the same for all ranks, and a word on those refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from neomoba_dist.checkpoint.layout import (
    KINDS,
    AgreedCheckpointError,
    AgreedDamageError,
    AgreedReadError,
    CheckpointError,
    DamageError,
    ReadError,
    complete_checkpoints,
    find_checkpoint,
)
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.verify import refuse_damage
from neomoba_dist.parallel.comm import agree, all_gather_objects
from neomoba_dist.parallel.mesh import Mesh

Result = TypeVar("Result")


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


class Candidates:
    """What `check_resume` has found, the same on every rank. All methods are collective over the world.

    say: told of every checkpoint that is refused, and why, on all ranks. Raises CheckpointError where none is whole: to
    start anew would lose the run without a word.
    """

    def __init__(self, output: Path, resume: str, mesh: Mesh, say: Callable[[str], None]) -> None:
        self._output, self._mesh, self._say = output, mesh, say
        self._named = resume not in ("auto", "must")
        if self._named:
            reader = require_whole(Path(resume), mesh, ())
            self._left = [reader.folder]
            if not any(name.startswith("optimizer.") for name in reader.tensors):
                raise AgreedCheckpointError(
                    f"{reader.folder}: holds the weights alone; start from them with --init_from"
                )
        else:
            names = all_gather_objects([path.name for path in complete_checkpoints(output)], mesh, "world")[0]
            self._left = [output / "checkpoints" / name for name in names]
        self._number = len(self._left)

    def newest(self, kinds: Sequence[str] = ()) -> CheckpointReader:
        """The newest one whose files are all there, with their sizes; of those that hold `kinds`, read for it, also the
        checksums are right."""
        while self._left:
            try:
                return open_whole(self._left[-1], self._mesh, kinds)
            except AgreedDamageError as error:
                self._refuse(error.problem)
        raise AgreedCheckpointError(
            f"{self._output}: none of its {self._number} checkpoints is whole; move checkpoints/ away to start anew, "
            "or copy a whole one back"
        )

    def finished(self, last_step: int) -> int | None:
        """The step of the newest whole one where that is `last_step` or a later one; of such a one, as nothing will be
        loaded, the checksums are looked at here."""
        for kinds in ((), KINDS):
            step = int(self.newest(kinds).index["step"])
            if step < last_step:
                return None
        return step

    def load(self, load: Callable[[CheckpointReader], None]) -> CheckpointReader:
        """Have the newest whole one loaded; returns it. `load`: holds what it reads against the checksums, and raises
        AgreedDamageError (`read_together`); it is then called with an older one."""
        while True:
            reader = self.newest()
            try:
                load(reader)
            except AgreedDamageError as error:
                self._refuse(error.problem)
            else:
                return reader

    def _refuse(self, problem: str) -> None:
        if self._named:
            raise AgreedDamageError(problem)
        self._say(f"warning: {self._left.pop()} is not used: {problem}")


def read_together(mesh: Mesh, read: Callable[[], Result]) -> Result:
    """`read` from a checkpoint on all ranks of the world, until all are done; what it returns on this one.

    Where it fails on any, raises on all ranks AgreedCheckpointError if it does not fit the model, else AgreedReadError
    if it could not be read, else AgreedDamageError.
    """
    problem: tuple[int, str] | None = None
    try:
        result = read()
    except DamageError as error:
        problem = (2, error.problem)
    except ReadError as error:
        problem = (1, str(error))
    except CheckpointError as error:
        problem = (0, str(error))
    if agree(problem is None, mesh):
        return result
    worst, text = min(found for found in all_gather_objects(problem, mesh, "world") if found)
    raise (AgreedCheckpointError, AgreedReadError, AgreedDamageError)[worst](text)


def require_whole(path: Path, mesh: Mesh, kinds: Sequence[str] = KINDS) -> CheckpointReader:
    """The checkpoint at `path` (its own or a run's folder), if all ranks find it whole. Raises CheckpointError."""
    seen = all_gather_objects(str(find_checkpoint(path)), mesh, "world")
    if len(set(seen)) > 1:
        raise AgreedCheckpointError(
            f"{path}: the ranks see different checkpoints ({', '.join(sorted(set(seen)))}); name one"
        )
    return open_whole(Path(seen[0]), mesh, kinds)


def require_whole_weights(reader: CheckpointReader, mesh: Mesh, kinds: Sequence[str] = KINDS[:1]) -> None:
    """`require_whole` of the weights that `reader` has opened, where there are checksums to hold them against.

    kinds: none where the load looks at the checksums.
    """
    if reader.has_checksums:
        require_whole(reader.folder, mesh, kinds)


def open_whole(folder: Path, mesh: Mesh, kinds: Sequence[str] = KINDS) -> CheckpointReader:
    """A checkpoint in which all ranks together `find_damage`, each in its share of the files, and find none, nor in
    its tables. Raises as `read_together`."""

    def read() -> CheckpointReader:
        refuse_damage(folder, kinds, (mesh.rank, mesh["world"].size))
        return CheckpointReader(folder)

    return read_together(mesh, read)
