"""Names of files and folders as users and files give them: what may be opened, and what can be written."""

import os
from pathlib import Path
from typing import Any


def is_file_name(name: Any) -> bool:
    """Whether `name`, read from a file, names something beside that file: never a path, which could lead anywhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & {"/", "\\"}


def folder_problem(folder: Path) -> str | None:
    """Why nothing can be written into a folder that exists or will be made; None if it can. Writes nothing."""
    try:
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        if not folder.is_dir():
            return f"{folder} is not a folder"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    return None
