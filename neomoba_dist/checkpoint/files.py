"""Files and folders that are on disk when a function returns."""

import os
import shutil
from pathlib import Path

from neomoba_dist.checkpoint.layout import CheckpointError


def make_empty(folder: Path) -> None:
    """An empty folder of this name. Raises CheckpointError."""
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while writing
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from error


def write_text(path: Path, text: str) -> None:
    """A text file, flushed to disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
