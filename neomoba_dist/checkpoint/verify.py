"""Is a checkpoint whole? Sizes and checksums of its manifest, held against the files on disk."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from neomoba_dist.checkpoint.layout import (
    KINDS,
    MANIFEST,
    STEMS,
    CheckpointError,
    read_index,
    read_json,
    tensor_entries,
)
from neomoba_dist.checkpoint.rank_file import checksum_of
from neomoba_dist.config.paths import is_file_name


def find_damage(folder: Path, kinds: Sequence[str] = KINDS, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint must not be loaded, in one line; None where it is whole.

    kinds: what will be read of it; of files that hold nothing of them only the sizes are looked at. share: (rank,
    ranks): of the files with tensors, only every `ranks`-th is read, so that the ranks of a job read each file once.
    Checkpoints of version 1 have no checksums: only that their files are there can be said.
    """
    try:
        index = read_index(folder)
        if index["version"] == 1:
            files = {piece.file for entry in tensor_entries(index, folder).values() for piece in entry.pieces}
            missing = sorted(name for name in files if not (folder / name).is_file())
            return f"{folder / missing[0]}: missing" if missing else None
        manifest = read_json(folder / MANIFEST)
        stems, large = {STEMS[kind] for kind in kinds}, []
        for name, entry in manifest.items():
            path = folder / name
            if not is_file_name(name):
                return f"{folder / MANIFEST}: {name!r} is no plain file name; do not use this checkpoint"
            if not path.is_file():
                return f"{path}: missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{path}: {size:,} bytes, not {entry['bytes']:,}"
            if "sha256" in entry:
                if sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                    return f"{path}: its checksum is wrong"
            elif name.partition("-")[0] in stems:
                large.append(name)
        if not {"index.json", "trainer.json"} <= set(manifest):
            return f"{folder / MANIFEST}: names no index.json or trainer.json"
        for name in sorted(large)[share[0] :: share[1]]:
            if checksum_of(folder / name).xxh3_64 != manifest[name]["xxh3_64"]:
                return f"{folder / name}: its checksum is wrong"
    except CheckpointError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST}: not a table of files ({error!r})"
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    return None
