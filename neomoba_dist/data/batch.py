"""Batch: the one thing that data and model share.

T = rows x length: the rows of one micro-batch laid end to end on a flat axis.
D = most documents a batch can hold (padding at a row's end counts as a document of its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

IGNORE_LABEL = -100
PADDING_POSITION = -1
LEAST_DOCUMENTS = 16  # that `Batch.trimmed` keeps room for
COUNTED_STEPS, PAIR_STEPS = 32, 16  # numbers of tokens that `Batch.with_counted` may come to


@dataclass(frozen=True, kw_only=True)
class EncoderTokens:
    """What the encoder of an encoder-decoder reads beside a Batch, which is its decoder's; T and D as there.

    Document i of the encoder is document i of the decoder; a document may have no token in the decoder.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of packed rows, of fixed shapes.

    input_ids    int64 [T]
    labels       int64 [T]; IGNORE_LABEL (-100) = not counted
    position_ids int64 [T]; restart at 0 at each document; PADDING_POSITION (-1) = padding, which no expert sees
    cu_seqlens   int32 [D + 1]; document borders on the flat axis, starting with 0. Row borders are document
                 borders; the padding at a row's end is one document; the tail repeats T so that shapes are fixed.
    row_ids      int64 [rows]; epoch * rows_in_epoch + row: names the row and its masks
    num_valid    counted labels of the whole update: all dp ranks, all micro-batches
    token_type_ids int64 [T] or None: 1 in the second text of a pair, else 0
    counted      int64 [C] or None: tokens whose losses are computed, see `with_counted`
    encoder      what an encoder-decoder's encoder reads, or None
    next_sentence_labels int64 [T] or None: at the first token of a pair 0 if its second text follows the first, 1 if
                 not; IGNORE_LABEL elsewhere
    pairs        int64 [P] or None: tokens that go through the head for pairs, see `with_counted`
    num_pairs    their number in the whole update, as num_valid counts labels
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    row_ids: torch.Tensor
    num_valid: int
    token_type_ids: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    encoder: EncoderTokens | None = None
    next_sentence_labels: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    num_pairs: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.row_ids.numel()

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.input_ids.numel() // self.rows

    def document_room(self) -> int:
        """The next power of two for its number of documents, at least LEAST_DOCUMENTS; for a batch on the host."""
        documents = max(int((part.cu_seqlens < len(part.input_ids)).sum()) for part in (self, self.encoder) if part)
        return max(LEAST_DOCUMENTS, 1 << (documents - 1).bit_length())

    def trimmed(self, least: int = LEAST_DOCUMENTS) -> Batch:
        """The same documents without most of the repeated T at the end of `cu_seqlens`; for a batch on the host.

        A GPU starts work for every document, empty or not. What stays is a power of two, so that there are few shapes,
        or `least`, if that is more.
        """
        kept = max(least, self.document_room())
        encoder = self.encoder and replace(self.encoder, cu_seqlens=self.encoder.cu_seqlens[: kept + 1])
        return replace(self, cu_seqlens=self.cu_seqlens[: kept + 1], encoder=encoder)

    def with_counted(self) -> Batch:
        """The same with `counted` and `pairs`: the tokens whose label counts, then others; for a batch on the host.

        A GPU would have to wait to know how many there are. They come in whole 32nds of all tokens, those of pairs in
        16ths, of which one holds all pairs of 16 tokens or more: few shapes.
        """
        pairs = None
        if self.next_sentence_labels is not None:
            pairs = _first_counted(self.next_sentence_labels, PAIR_STEPS, least=1)
        return replace(self, counted=_first_counted(self.labels, COUNTED_STEPS), pairs=pairs)

    def local_valid(self) -> int:
        """Counted labels of this micro-batch alone."""
        return int((self.labels != IGNORE_LABEL).sum())

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        for part in (self, self.encoder):
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor)) if part else ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; from the host to a GPU while the host goes on."""
        encoder = self.encoder and replace(self.encoder, **_moved(self.encoder, device))
        return replace(self, **_moved(self, device), encoder=encoder)


def _moved(part: Batch | EncoderTokens, device: torch.device | str) -> dict[str, Any]:
    """Its tensors on `device`."""
    to_gpu = torch.device(device).type == "cuda"
    return {
        name: (value.pin_memory() if to_gpu and value.is_cpu else value).to(device, non_blocking=True)
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }


def _first_counted(labels_T: torch.Tensor, steps: int, least: int = 0) -> torch.Tensor:
    """The tokens whose label counts, then others, up to whole parts of all tokens: int64, at least `least`."""
    counts, step = labels_T != IGNORE_LABEL, max(1, len(labels_T) // steps)
    found, others = counts.nonzero().squeeze(1), (~counts).nonzero().squeeze(1)
    wanted = -(-max(len(found), least) // step) * step
    return torch.cat((found, others[: wanted - len(found)]))
