"""Which checkpoints of a run stay on disk. Each function is called by one rank."""

import shutil
from pathlib import Path

from neomoba_dist.checkpoint.layout import complete_checkpoints, step_of


def remove_old(output: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove all checkpoints but the newest `keep_last` (0: none is removed) and those of every `keep_every`-th step.

    A folder goes out of sight before its files go, so none is ever half there.
    """
    for old in complete_checkpoints(output)[:-keep_last] if keep_last else ():
        if keep_every and step_of(old) % keep_every == 0:
            continue
        gone = old.with_name(old.name + ".removed")
        old.rename(gone)
        shutil.rmtree(gone)


def start_from(output: Path, step: int) -> None:
    """What a run does before it goes on from `step`: newer checkpoints go aside, and what a killed run left half
    done goes away.

    Newer ones are renamed to `step_N.abandoned`: otherwise a later `--resume auto` would pick the branch that was
    given up.
    """
    for folder in complete_checkpoints(output):
        if step_of(folder) > step:
            aside = folder.with_name(folder.name + ".abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    for left in ("checkpoints/step_*.writing", "checkpoints/step_*.removed", "exports/step_*.writing"):
        for folder in output.glob(left):
            shutil.rmtree(folder, ignore_errors=True)
