"""Corpora on other machines: files come into a cache, checked by size and sha256, before anything reads them.

Places: `http://...` and `https://...` folders; `pipe:COMMAND`, a shell command that writes the file whose name stands
for its `{}` to its output; any other `scheme://` folder, such as `s3://bucket/corpus`, through fsspec, which needs the
package for that scheme (s3fs). A file in the cache is named by its digest and has its name only when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import ShardEntry

ATTEMPTS = 3
WAIT_SECONDS = 1.0  # before the second attempt; four times as long before the third
TIMEOUT_SECONDS = 60.0
_PIECE = 1 << 20


def is_remote(location: str) -> bool:
    """Whether a location is not a folder of this machine."""
    return location.startswith("pipe:") or "://" in location


class RemoteFolder:
    """The files of a corpus elsewhere. `cache` is a folder of this machine, shared by its ranks."""

    def __init__(self, location: str, cache: Path) -> None:
        """DataError for a `pipe:` without `{}`."""
        if location.startswith("pipe:") and "{}" not in location:
            raise DataError(f"{location}: write {{}} where the command takes the name of the file")
        self.location, self._files = location, cache / "files"

    def url(self, name: str) -> str:
        """Where a file of the corpus lies."""
        if self.location.startswith("pipe:"):
            return self.location.replace("{}", shlex.quote(name))
        return f"{self.location.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """A small file, as it is now."""
        return b"".join(_pieces(self.url(name)))

    def path(self, name: str, sha256: str) -> Path:
        """The local copy of a file, fetched if it is not in the cache. DataError if its content is not `sha256`."""
        path = self._files / f"{sha256[:16]}-{name}"
        if not path.is_file():
            self._files.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f".{path.name}.lock")):
                if not path.is_file():  # another rank may have fetched it meanwhile
                    self._fetch(name, sha256, path)
        return path

    def problem(self, entry: ShardEntry) -> str | None:
        """What is wrong with a shard, as far as its size tells; a `pipe:` cannot tell. None if nothing is."""
        if self.location.startswith("pipe:"):
            return None
        url = self.url(entry.file)
        try:
            size = _size(url)
        except DataError as error:
            return str(error)
        return None if size in (None, entry.bytes) else f"{url}: {size} bytes, the index says {entry.bytes}"

    def _fetch(self, name: str, sha256: str, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                digest = hashlib.sha256()
                with open(temporary, "wb") as file:
                    for piece in _pieces(self.url(name)):
                        digest.update(piece)
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                if digest.hexdigest() != sha256:
                    size = temporary.stat().st_size
                    raise DataError(f"{self.url(name)}: {size} bytes whose sha256 is not that of the index")
                temporary.rename(path)
                return
            except DataError:
                temporary.unlink(missing_ok=True)
                if attempt == ATTEMPTS:
                    raise
                time.sleep(WAIT_SECONDS * 4 ** (attempt - 1))


def _pieces(url: str) -> Iterator[bytes]:
    """The content of a url. DataError, in one line, if it cannot be had."""
    try:
        if url.startswith("pipe:"):
            yield from _command_output(url.removeprefix("pipe:"))
        elif url.startswith(("http://", "https://")):
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                while piece := response.read(_PIECE):
                    yield piece
        else:
            filesystem, path = _filesystem(url)
            with filesystem.open(path, "rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors too
        raise DataError(f"{url}: cannot be fetched ({error})") from error


def _command_output(command: str) -> Iterator[bytes]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(_PIECE):
            yield piece
    if process.returncode:
        raise DataError(f"pipe:{command}: ended with exit code {process.returncode}")


def _size(url: str) -> int | None:
    """Bytes of the file at a url, None where the server does not say. DataError if it is not there."""
    try:
        if url.startswith(("http://", "https://")):
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                length = response.headers.get("Content-Length")
                return None if length is None else int(length)
        filesystem, path = _filesystem(url)
        return int(filesystem.size(path))
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be fetched ({error})") from error


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a url, and the path in it."""
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no package for the scheme, or no such scheme
        raise DataError(f"{url}: cannot be read here ({error})") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among the processes of this machine; the system takes it back from one that dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
