"""Is a checkpoint whole? Sizes and checksums of its manifest, held against the files on disk."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from neomoba_dist.checkpoint.index import read_index, tensor_entries
from neomoba_dist.checkpoint.layout import (
    KINDS,
    MANIFEST,
    STEMS,
    DamageError,
    ReadError,
    is_stored_name,
    read_json,
)
from neomoba_dist.checkpoint.rank_file import STREAMS, checksum_of


def find_damage(folder: Path, kinds: Sequence[str] = KINDS, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint must not be loaded, in one line; None where it is whole.

    kinds: what will be read of it; of files that hold nothing of them only the sizes are looked at, with no kinds of
    all files. share: (rank, ranks): of the files with tensors, only every `ranks`-th is looked at, so that a job asks
    for each once, and a rank where it can for what it wrote itself. Checkpoints of version 1 have no checksums: only
    that their files are there can be said. Raises CheckpointError where nothing can be said: the format is another one,
    or, as ReadError, a file that is there could not be read.
    """
    try:
        index = read_index(folder)
        if index["version"] == 1:
            entries = tensor_entries(index, folder).values()
            missing = sorted(name for entry in entries for name in entry.files() if not (folder / name).is_file())
            return f"{folder / missing[0]}: missing" if missing else None
        if not (folder / MANIFEST).is_file():
            return f"{folder / MANIFEST}: missing"
        manifest = read_json(folder / MANIFEST)
        if strange := next((name for name in manifest if not is_stored_name(name)), None):
            return f"{folder / MANIFEST}: {strange!r} is no plain file name; do not use this checkpoint"
        if not {"index.json", "trainer.json"} <= set(manifest):
            return f"{folder / MANIFEST}: names no index.json or trainer.json"
        texts = sorted(name for name, entry in manifest.items() if "sha256" in entry)
        for name in (*texts, *_files_of_share(manifest, share)):
            path, entry = folder / name, manifest[name]
            if not path.is_file():
                return f"{path}: missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{path}: {size:,} bytes, not {entry['bytes']:,}"
            if name in texts and sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                return f"{path}: its checksum is wrong"
        checksums = checksums_of_share(manifest, kinds, share)
        with ThreadPoolExecutor(STREAMS) as pool:
            found = pool.map(checksum_of, (folder / name for name in checksums))
            for (name, checksum), written in zip(checksums.items(), found, strict=True):
                if written.xxh3_64 != checksum:
                    pool.shutdown(cancel_futures=True)
                    return f"{folder / name}: its checksum is wrong"
    except DamageError as error:
        return error.problem
    except (KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST}: not a table of files ({error!r})"
    except OSError as error:
        raise ReadError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    return None


def refuse_damage(folder: Path, kinds: Sequence[str] = KINDS, share: tuple[int, int] = (0, 1)) -> None:
    """Raises DamageError where `find_damage` finds any, or as that does."""
    if problem := find_damage(folder, kinds, share):
        raise DamageError(problem)


def checksums_of_share(
    manifest: Mapping[str, Any], kinds: Sequence[str] = KINDS, share: tuple[int, int] = (0, 1)
) -> dict[str, str]:
    """By name the checksums of those files of a share that hold something of the kinds; as `find_damage` has both."""
    stems = {STEMS[kind] for kind in kinds}
    names = _files_of_share(manifest, share)
    return {name: manifest[name]["xxh3_64"] for name in names if Path(name).name.partition("-")[0] in stems}


def _files_of_share(manifest: Mapping[str, Any], share: tuple[int, int]) -> list[str]:
    """Every `ranks`-th of the files with tensors."""
    names = (name for name, entry in manifest.items() if "sha256" not in entry)
    return sorted(names, key=lambda name: Path(name).name)[share[0] :: share[1]]
