"""One save on disk: every rank's files and a note on them; then rank 0's index and manifest, and one rename.

Nothing is gathered. What rank 0 must know of the others' files it reads from their notes, small JSON files that appear
beside the files, whole, once these are on disk.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from neomoba_dist.checkpoint.files import sync, write_text
from neomoba_dist.checkpoint.index import describe_fragments, index_text
from neomoba_dist.checkpoint.layout import (
    MANIFEST,
    RANKS_PER_FOLDER,
    CheckpointError,
    file_name,
    logical_name,
    read_json,
)
from neomoba_dist.checkpoint.rank_file import write_rank_file
from neomoba_dist.checkpoint.state import StateFragment


def note_path(folder: Path, rank: int) -> Path:
    """What a rank tells of its files; gone once rank 0 has put all together."""
    return (folder / file_name("model", rank, RANKS_PER_FOLDER)).with_name(f"rank-{rank:05d}.json")


def write_fragments(folder: Path, rank: int, fragments: Sequence[StateFragment], kinds: Sequence[str]) -> None:
    """Write the rank's files of these kinds, then its note. Raises CheckpointError."""
    held = [part._replace(values={k: v for k, v in part.values.items() if k in kinds}) for part in fragments]
    path, written = note_path(folder, rank), {}
    try:
        path.parent.mkdir(exist_ok=True)
        for name, tensors in rank_files(rank, held).items():
            path = folder / name
            written[name] = asdict(write_rank_file(path, tensors))
        path = note_path(folder, rank)
        unfinished = path.with_suffix(".writing")
        write_text(unfinished, note_text(written, held))
        unfinished.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space or fix the folder") from error


def rank_files(rank: int, fragments: Iterable[StateFragment]) -> dict[str, dict[str, torch.Tensor]]:
    """The files of a rank, each with its tensors by key."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for spec, _, values in fragments:
        for kind, value in values.items():
            files.setdefault(file_name(kind, rank, RANKS_PER_FOLDER), {})[logical_name(kind, spec.name)] = value
    return files


def note_text(written: Mapping[str, Any], fragments: Iterable[StateFragment]) -> str:
    """What a rank tells rank 0: the entries of its files in the manifest, and its pieces of the tensors."""
    return json.dumps({"files": written, "pieces": describe_fragments(fragments)}, separators=(",", ":"))


def manifest_text(entries: Mapping[str, Any]) -> str:
    """manifest.json, a line per file."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    return f"{{\n{lines}\n}}\n"


def commit(writing: Path, final: Path, ranks: int, document: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Put the ranks' notes together as index and manifest, and give the folder its final name; on one rank.

    Raises CheckpointError; `final` is then as it was.
    """
    try:
        notes = [read_json(note_path(writing, rank)) for rank in range(ranks)]
        texts = {
            "index.json": index_text(document, [note["pieces"] for note in notes]),
            "trainer.json": json.dumps(trainer, indent=1) + "\n",
        }
        manifest = {name: entry for note in notes for name, entry in note["files"].items()}
        for name, text in texts.items():
            write_text(writing / name, text)
            manifest[name] = {"bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}
        write_text(writing / MANIFEST, manifest_text(manifest))
        for rank in range(ranks):
            note_path(writing, rank).unlink()
        for folder in {(writing / name).parent for name in manifest}:
            sync(folder)
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            final.rename(replaced)
        writing.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{writing}: cannot be written ({error.strerror}); free space or fix the folder"
        ) from error
