"""Labelled texts as documents of a Batch, and the stream of updates of fine-tuning.

An example is one document with its label at the first token, or for a contrastive pair several: query, positive and
maybe negative, where the query's label is the number of the positive among all positives and negatives of the
micro-batch. Documents fill rows of `length` tokens one after the other; as many rows as it takes.

The stream is a function of (examples, seed, k) like that of pretraining: position p of the run is the example that the
epoch's order names, update k takes the next ones, and ranks and accumulation only divide it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypedDict

import numpy as np
import torch

from neomoba_dist.data.batch import IGNORE_LABEL, PADDING_POSITION, Batch
from neomoba_dist.data.errors import AgreedError, DataError
from neomoba_dist.data.order import RowOrder
from neomoba_dist.data.text_files import LabelledText
from neomoba_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """documents: ids of one, or of query, positive and maybe negative. label: None of a test set or a query. second:
    where the second text of a document begins; None: it holds one."""

    documents: tuple[list[int], ...]
    label: int | None
    index: str
    second: int | None = None

    def token_types(self, place: int) -> list[int]:
        """Of document number `place`: 0, in its second text 1."""
        length = len(self.documents[place])
        first = length if self.second is None else self.second
        return [0] * first + [1] * (length - first)


@dataclass(frozen=True)
class Examples:
    """All of one split. cut: how many did not fit into `length` tokens; label_unit: of the integer labels."""

    examples: list[Example]
    length: int
    padding: int
    cut: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Names the examples: a hash of all ids and labels."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.documents, example.label)).encode())
        return digest.hexdigest()[:32]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The examples of these numbers as a Batch on the host; `num_valid` is its own count, `row_ids` name the first
        document of each row."""
        chosen = [self.examples[number] for number in numbers]
        documents = [
            (number * len(example.documents) + place, ids, example.token_types(place))
            for number, example in zip(numbers, chosen, strict=True)
            for place, ids in enumerate(example.documents)
        ]
        pieces: list[tuple[list[int], list[int], bool]] = []  # ids, token types, and whether they are padding
        row_ids: list[int] = []
        free = 0
        for name, ids, types in documents:
            if not row_ids or free < len(ids):
                pieces += self._padding(free)
                row_ids.append(name)
                free = self.length
            pieces.append((ids, types, False))
            free -= len(ids)
        pieces += self._padding(free)
        positions = [np.full(len(ids), PADDING_POSITION) if pad else np.arange(len(ids)) for ids, _, pad in pieces]
        labels = np.full(len(row_ids) * self.length, IGNORE_LABEL)
        starts = [0, *accumulate(len(ids) for ids, *_ in pieces)]
        first = [start for start, (*_, padding) in zip(starts, pieces, strict=False) if not padding]
        labels[first] = [label for group in _labels(chosen) for label in group]
        return Batch(
            input_ids=torch.tensor([token for ids, *_ in pieces for token in ids]),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(np.concatenate(positions)),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            row_ids=torch.tensor(row_ids),
            num_valid=int((labels != IGNORE_LABEL).sum()),
            token_type_ids=torch.tensor([kind for _, types, _ in pieces for kind in types]),
        )

    def _padding(self, count: int) -> list[tuple[list[int], list[int], bool]]:
        """So many tokens of padding as a piece of `batch`, if any."""
        return [([self.padding] * count, [0] * count, True)] if count else []


def _labels(examples: Sequence[Example]) -> list[list[int]]:
    """The label of every document of every example."""
    found = []
    for number, example in enumerate(examples):
        others = len(example.documents) - 1
        own = number * others if others else example.label  # its positive's number, as all have as many documents
        found.append([IGNORE_LABEL if own is None else own] + [IGNORE_LABEL] * others)
    return found


def encode_examples(
    texts: Sequence[LabelledText], tokenizer: Tokenizer, length: int, *, pairs: bool, unit: float, name: str
) -> Examples:
    """Documents of at most `length` tokens: [CLS] a [SEP] b [SEP] where texts are one example's, each by itself with
    `pairs`. unit: of the integer labels (1 for classes). Raises DataError where there is nothing, or of uneven pairs.
    """
    if not texts:
        raise AgreedError(f"{name}: holds no examples")
    widths = {len(text.texts) for text in texts}
    if len(widths) > 1:
        raise AgreedError(f"{name}: some examples have a negative and some have none; give all of them one, or none")
    encoded = tokenizer.encode_batch([part for text in texts for part in text.texts])
    width = widths.pop()
    head, tail = tokenizer.document_borders
    found, cut = [], 0
    for number, text in enumerate(texts):
        parts = encoded[number * width : (number + 1) * width]
        groups = [[part] for part in parts] if pairs else [parts]
        documents = []
        for group in groups:
            room = length - len(head) - len(tail) * len(group)
            if room < len(group):
                raise DataError(f"neomoba.phase.sequence_length {length} leaves no room for a text; set it to 64")
            cut += sum(map(len, group)) > room
            kept = _cut(group, room)
            documents.append(head + [token for part in kept for token in part + tail])
            second = len(head) + len(kept[0]) + len(tail) if len(kept) > 1 else None
        label = None if text.label is None else round(text.label / unit)
        found.append(Example(tuple(documents), label, text.index, second))
    return Examples(found, length, tokenizer.special.padding, cut)


def _cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """Parts of at most `room` tokens together: the longest loses its end first, as in BERT."""
    lengths = [len(part) for part in parts]
    while (over := sum(lengths) - room) > 0:
        longest = lengths.index(max(lengths))
        second = max((n for i, n in enumerate(lengths) if i != longest), default=0)
        lengths[longest] -= max(1, min(over, lengths[longest] - second))
    return [part[:n] for part, n in zip(parts, lengths, strict=True)]


class ExampleState(TypedDict):
    """All that a resume needs; the same on every rank. `rows`: examples consumed by the whole run."""

    fingerprint: str
    seed: int
    rows: int


class ExampleStream:
    """Iterates over updates without end: yields (micro-batches of this data-parallel rank, state after them).

    Like `stream.UpdateStream`, with examples in place of rows.
    """

    skipped_rows = 0

    def __init__(
        self,
        examples: Examples,
        *,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.examples, self.seed, self.rows_consumed = examples, seed, 0
        self._shape = (accumulation, dp_size, micro_batch_size)
        self._dp_rank = dp_rank
        self._order = RowOrder(np.array([len(examples)]), seed)
        self._fingerprint = examples.fingerprint

    def __iter__(self) -> Generator[tuple[list[Batch], ExampleState], None, None]:
        """Micro-batch a of rank r has examples [(a * dp + r) * micro, ... + micro) of an update."""
        size = int(np.prod(self._shape))
        while True:
            places = np.arange(self.rows_consumed, self.rows_consumed + size)
            mine = self._order.rows_at(places).reshape(self._shape)[:, self._dp_rank]
            batches = [self.examples.batch(numbers) for numbers in mine.tolist()]
            num_valid = sum(batch.num_valid for batch in batches)
            self.rows_consumed += size
            yield [replace(batch, num_valid=num_valid) for batch in batches], self.state_dict()

    def state_dict(self) -> ExampleState:
        """The position after the last update that was yielded."""
        return ExampleState(fingerprint=self._fingerprint, seed=self.seed, rows=self.rows_consumed)

    def row_ids(self, state: ExampleState) -> list[int]:
        """Numbers of the examples of a whole update, over all ranks, by the state after it."""
        return self._order.rows_at(np.arange(state["rows"] - int(np.prod(self._shape)), state["rows"])).tolist()

    def load_state_dict(self, state: ExampleState, *, allow_data_change: bool = False) -> None:
        """Goes on where `state` was taken. DataError if it is of other examples, unless `allow_data_change`."""
        if not allow_data_change and (state["fingerprint"], state["seed"]) != (self._fingerprint, self.seed):
            raise DataError(
                "neomoba.data.train or neomoba.phase.seed is not that of the checkpoint; restore it to resume, or give "
                "another --output_dir"
            )
        self.rows_consumed = state["rows"]
