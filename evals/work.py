"""Items of a task over all workers: dealt in batches, written down as they are done, taken up again at any world size.

A worker is one model-parallel group; workers are the data-parallel ranks. Round after round each takes a batch; then
everybody has everybody's results and global rank 0 appends them to the journal, one JSON line per item, keyed by a hash
of the checkpoint, the attention and the item's tokens. A run that was interrupted goes on after the last round,
whatever its world size is now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from evals.cli import EvalError, progress

if TYPE_CHECKING:
    from neomoba_dist.parallel.mesh import Mesh

T = TypeVar("T")
ItemResult = dict[str, Any]


class ItemError(Exception):
    """One item that cannot be measured; the message says why, and the other items count."""


@dataclass(frozen=True)
class Item(Generic[T]):
    """One prompt or row. key: names it and everything that its result depends on. tokens: how much of a batch."""

    key: str
    tokens: int
    value: T


def item_key(*parts: object) -> str:
    """A short hash of what an item's result depends on; bytes and anything that str() tells apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


@dataclass(frozen=True)
class Workers:
    """Who works. batch_tokens: most tokens of one forward, unless a single item has more. journal: None: no resume."""

    mesh: Mesh
    batch_tokens: int = 4096
    journal: Path | None = None

    def run(
        self, name: str, items: Sequence[Item[T]], measure: Callable[[list[T]], list[ItemResult]]
    ) -> list[ItemResult]:
        """`measure` of every item, in order, on every rank.

        measure: called with a batch of values, by all ranks of a worker alike; by all workers at once where they share
        experts. Where an item cannot be measured (ItemError), its result is {"error": reason} and the others count.
        Raises EvalError where the ranks were given different items.
        """
        self.require_same(name, [item.key for item in items])
        done = self._read_journal()
        todo = list({item.key: item for item in items if item.key not in done}.values())
        batches = self._batches(todo)
        dp = self.mesh["dp"]
        bar = progress((), len(todo), name, "item", disable=self.mesh.rank != 0)
        for start in range(0, len(batches), dp.size):
            mine = start + dp.index
            found: list[tuple[str, ItemResult]] = []
            if mine < len(batches) or self.mesh["ep"].size > 1:  # who shares experts takes part in every round
                batch = batches[min(mine, len(batches) - 1)]
                results = self._measured(measure, [item.value for item in batch])
                if mine < len(batches):
                    found = [(item.key, result) for item, result in zip(batch, results, strict=True)]
            together = [entry for part in self._gathered(found, "dp") for entry in part]
            done.update(together)
            self._write_journal(together)
            bar.update(len(together))
        bar.close()
        return [done[item.key] for item in items]

    def require_same(self, what: str, value: object) -> None:
        """Raises EvalError unless all ranks were given the same `value`."""
        found = self._gathered(item_key(value), "world")
        other = [rank for rank, key in enumerate(found) if key != found[0]]
        if other:
            raise EvalError(
                f"{what}: rank {other[0]} has other prompts than rank 0; give all ranks the same files and versions of "
                "packages, or prepare the data once with: python -m evals prepare"
            )

    def _gathered(self, value: T, axis: str) -> list[T]:
        from neomoba_dist.parallel.comm import all_gather_objects

        return all_gather_objects(value, self.mesh, axis)

    def _batches(self, items: Sequence[Item[T]]) -> list[list[Item[T]]]:
        batches: list[list[Item[T]]] = []
        held = 0
        for item in items:
            if not batches or held + item.tokens > self.batch_tokens:
                batches.append([])
                held = 0
            batches[-1].append(item)
            held += item.tokens
        return batches

    def _measured(self, measure: Callable[[list[T]], list[ItemResult]], values: list[T]) -> list[ItemResult]:
        """A batch, or its items one by one where one of them cannot be measured."""
        try:
            return measure(values)
        except ItemError as error:
            if self.mesh["ep"].size > 1:  # other workers wait in the middle of the same batch
                raise
            if len(values) == 1:
                return [{"error": str(error)}]
            return [result for value in values for result in self._measured(measure, [value])]

    def _read_journal(self) -> dict[str, ItemResult]:
        """What rank 0 finds; a last line that was cut off is left out."""
        found: dict[str, ItemResult] = {}
        if self.mesh.rank == 0 and self.journal is not None and self.journal.is_file():
            text = self.journal.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                self.journal.write_text(text + "\n", encoding="utf-8")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                found[entry["key"]] = entry["result"]
        return self._gathered(found, "world")[0]

    def _write_journal(self, entries: Sequence[tuple[str, ItemResult]]) -> None:
        if self.mesh.rank or self.journal is None or not entries:
            return
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"key": key, "result": result}) + "\n" for key, result in entries if "error" not in result)
        with self.journal.open("a", encoding="utf-8") as file:
            file.writelines(lines)
