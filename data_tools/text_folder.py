"""A folder of text that fetch and clean write: documents-00000.jsonl.zst ..., and, last, manifest.json.

Each part is written under a temporary name, synced and renamed; then `.unfinished.json` says how far the work is. The
next run goes on behind the last finished part. While that file is there, no other tool reads the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.cleaning import Document
from neomoba_dist.config.paths import is_file_name
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import write_atomically

PART_BYTES = 64 << 20
MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = ".unfinished.json"


class TextFolder:
    """Writes documents into a folder, part by part.

    recipe    what decides the text: another recipe in the folder is refused with DataError, unless `overwrite`, which
              also begins again where a finished or damaged text of this recipe lies
    state     of the caller, at the end of the last finished part: where to go on; empty at the beginning
    finished  the folder holds the whole text of this recipe already
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], overwrite: bool) -> None:
        self.folder, self.recipe = folder, recipe
        self.parts: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}
        self.finished = False
        self._lines: list[bytes] = []
        self._size = 0
        for name in (UNFINISHED_FILE,) if overwrite else (UNFINISHED_FILE, MANIFEST_FILE):
            try:
                if (folder / name).is_file() and self._go_on(folder / name):
                    return
            except DataError:
                if not overwrite:
                    raise

    def files(self) -> list[Path]:
        """The finished parts."""
        return [self.folder / part["file"] for part in self.parts]

    def add(self, document: Document, state: Callable[[], dict[str, Any]]) -> None:
        """Appends a document; `state()` is kept as `state` if a part ends here."""
        record = {"id": document.id, "text": document.text}
        # half of a surrogate pair, which JSON can spell, has no bytes
        self._lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
        self._size += len(self._lines[-1])
        if self._size >= PART_BYTES:
            self._finish_part()
            self.state = state()
            self._mark()

    def close(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes the last part and the manifest, which holds `facts`; returns it. DataError if there is no document."""
        if self._lines:
            self._finish_part()
        if not self.parts:
            raise DataError(f"{self.folder}: no document left to write")
        manifest = {"format": "neomoba-text", "version": 1, "recipe": self.recipe, "parts": self.parts} | facts
        write_atomically(self.folder / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
        (self.folder / UNFINISHED_FILE).unlink()
        return manifest

    def _go_on(self, file: Path) -> bool:
        """Takes over what a run has left; False if it has left nothing."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            recipe, parts, state = found["recipe"], found["parts"], found.get("state", {})
            names = [part["file"] for part in parts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: damaged or of another command ({error}); add --overwrite") from error
        for name in names:
            if not is_file_name(name):
                raise DataError(f"{file}: names {name!r}, which is no plain file name; add --overwrite to begin again")
        if not parts:
            return False
        if recipe != self.recipe:
            raise DataError(
                f"{self.folder}: holds text of another source or settings; add --overwrite or change --output"
            )
        for name, part in zip(names, parts, strict=True):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != part["bytes"]:
                raise DataError(f"{path}: missing or not of {part['bytes']} bytes; add --overwrite to begin again")
        self.parts, self.state, self.finished = parts, state, file.name == MANIFEST_FILE
        return True

    def _begin(self) -> None:
        """Takes out what was there before, now that there is something in its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark()
        parts = (*self.folder.glob("documents-*.jsonl.zst"), *self.folder.glob(".documents-*.tmp"))
        for stale in (self.folder / MANIFEST_FILE, *parts):
            stale.unlink(missing_ok=True)

    def _finish_part(self) -> None:
        import pyarrow

        if not self.parts:
            self._begin()
        buffer = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
            for line in self._lines:
                stream.write(line)
        payload = buffer.getvalue().to_pybytes()
        path = self.folder / f"documents-{len(self.parts):05d}.jsonl.zst"
        write_atomically(path, payload)
        digest = hashlib.sha256(payload).hexdigest()
        self.parts.append({"file": path.name, "bytes": len(payload), "sha256": digest, "documents": len(self._lines)})
        self._lines, self._size = [], 0

    def _mark(self) -> None:
        state = {"recipe": self.recipe, "parts": self.parts, "state": self.state}
        write_atomically(self.folder / UNFINISHED_FILE, json.dumps(state).encode("utf-8"))
