"""Shows what is in a folder of shards: counts, document lengths, and rows as training will see them.

With --run and --rows-of-step: the rows of a step of a training run, of all its ranks, as they were trained on.

Rows are decoded document by document and, inside a document, MoBA block by block: blocks are counted from its start.
With --objective mlm a chosen token is written as {original>shown}.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.cli import command_parser, positive_int, run
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from neomoba_dist.data.batch import Batch, EncoderTokens
    from neomoba_dist.data.corpus import Corpus
    from neomoba_dist.data.tokenizer import Tokenizer

_BAR = 40


def summary_lines(corpus: Corpus) -> list[str]:
    """Counts, tokenizer and length histogram."""
    index = corpus.index
    lines = [
        f"{corpus.folder}: {index.documents} documents, {index.tokens} tokens ({index.dtype}), "
        f"{len(index.shards)} shards, {sum(shard.bytes for shard in index.shards) / 1e6:.1f} MB",
        f"fingerprint {index.fingerprint}, unigram entropy {index.unigram_entropy:.3f} nats/token",
        index.unknown,
        *counted_lines(corpus),
        f"tokenizer {index.tokenizer.kind}, {index.tokenizer.vocab_size} ids, "
        + ", ".join(f"{role} {i}" for role, i in index.tokenizer.special.items() if i is not None),
        "documents by length in tokens:",
    ]
    most = max(count for _, count in index.length_histogram)
    lines += [
        f"  up to {length:>9} {count:>10} {'#' * round(_BAR * count / most)}"
        for length, count in index.length_histogram
    ]
    return lines + [
        f"  subset {least}+: {documents} documents, {tokens} tokens" for least, documents, tokens in index.subsets
    ]


def counted_lines(corpus: Corpus) -> list[str]:
    """How many tokens the loss counts, where it does not count all."""
    if not corpus.has_loss_spans:
        return []
    share = corpus.counted_tokens / corpus.index.tokens
    return [f"{corpus.counted_tokens} tokens count for the loss, {share:.1%}: the responses"]


def row_lines(batch: Batch, tokenizer: Tokenizer, objective: str, max_characters: int, block_size: int) -> list[str]:
    """One row: a line for each document, and below it one for each of its blocks where it has several. Of a pair what
    the encoder reads, then what the decoder does."""
    lines = [f"row {int(batch.row_ids[0])}: {batch.local_valid()} of {batch.length} tokens have a label"]
    labels = batch.labels if objective == "mlm" else None
    if batch.encoder is None:
        return lines + document_lines(batch, labels, tokenizer, max_characters, block_size)
    for name, side in (("encoder", batch.encoder), ("decoder", batch)):
        lines += [f" {name}", *document_lines(side, None, tokenizer, max_characters, block_size)]
    return lines


def document_lines(
    side: Batch | EncoderTokens, labels: Tensor | None, tokenizer: Tokenizer, max_characters: int, block_size: int
) -> list[str]:
    """Of the documents of one row. labels: of its tokens, to be marked."""
    lines, padding = [], tokenizer.special.padding
    for start, stop in ((a, b) for a, b in itertools.pairwise(side.cu_seqlens.tolist()) if a < b):
        if set(side.input_ids[start:stop].tolist()) == {padding}:
            lines.append(f"  [{start}, {stop}) padding")
            continue
        texts = []
        for first in range(start, stop, block_size):
            span = slice(first, min(first + block_size, stop))
            ids = side.input_ids[span].tolist()
            text = tokenizer.decode(ids) if labels is None else marked_text(ids, labels[span].tolist(), tokenizer)
            texts.append(repr(text if len(text) <= max_characters else text[:max_characters] + " ..."))
        lines.append(f"  [{start}, {stop}) document of {stop - start} tokens" + f": {texts[0]}" * (len(texts) == 1))
        if len(texts) > 1:
            borders = [*range(start, stop, block_size), stop]
            spans = itertools.pairwise(borders)
            lines += [f"    block {n} [{a}, {b}): {t}" for n, ((a, b), t) in enumerate(zip(spans, texts, strict=True))]
    return lines


def marked_text(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> str:
    """The text of `ids`, every token with a label written as {original>shown}."""
    parts: list[str] = []
    run_start = 0
    for i, label in enumerate([*labels, 0]):
        if label >= 0:
            if i > run_start:
                parts.append(tokenizer.decode(ids[run_start:i]))
            if i < len(ids):
                parts.append(f"{{{tokenizer.token(label)}>{tokenizer.token(ids[i])}}}")
            run_start = i + 1
    return " ".join(parts)


def show_step(run: Path, step: int, max_characters: int) -> None:
    """Print the rows of a step of a run. DataError, in one line."""
    from data_tools.run_rows import find_step, read_rows

    found = find_step(run, step)
    batches, tokenizer = read_rows(run, step, found)
    config, entry = found.config, found.entry
    if entry is None:
        said = "did not end"
    elif entry.get("skip_reason"):
        said = f"skipped: {entry['skip_reason']}"
    else:
        said = f"loss {entry['loss']:.4f}, gradient norm {entry['grad_norm']:.3f}"
    print(f"{run}: step {step}, {said}; rows {found.first} to {found.first + found.rows - 1} of the run")
    for batch in batches:
        print(
            "\n".join(row_lines(batch, tokenizer, config.model.objective, max_characters, config.model.moba_block_size))
        )


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("inspect_shards", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of shards")
    parser.add_argument("--run", type=Path, metavar="RUN", help="folder of a training run, in place of shards")
    parser.add_argument("--rows_of_step", type=positive_int, metavar="N", help="of the run: what step N consists of")
    parser.add_argument("--rows", type=positive_int, default=2, help="rows to show (default: 2)")
    parser.add_argument("--sequence_length", type=positive_int, default=1024, help="tokens in a row (default: 1024)")
    parser.add_argument(
        "--objective", choices=("mlm", "clm", "span_corruption"), default="mlm", help="labels to show (default: mlm)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="order and masks (default: 1234)")
    parser.add_argument("--max_characters", type=positive_int, default=400, help="of each block (default: 400)")
    parser.add_argument("--block_size", type=positive_int, default=512, help="MoBA's, in tokens (default: 512)")
    args = parser.parse(argv)
    if (args.run is None) != (args.rows_of_step is None) or (args.run is None) == (args.folder is None):
        raise DataError("give a folder of shards, or --run RUN with --rows-of-step N")
    if args.run is not None:
        show_step(args.run, args.rows_of_step, args.max_characters)
        return

    from itertools import islice

    from neomoba_dist.data.check import open_corpus

    corpus = open_corpus(args.folder, key="folder")
    print("\n".join(summary_lines(corpus)), flush=True)

    from neomoba_dist.config import DataConfig
    from neomoba_dist.data.rows import Source
    from neomoba_dist.data.stream import UpdateStream

    stream = UpdateStream(
        [Source(corpus)],
        DataConfig(train=str(args.folder), cache=None, prefetch=0),
        objective=args.objective,
        sequence_length=args.sequence_length,
        micro_batch_size=1,
        accumulation=1,
        seed=args.seed,
    )
    print(f"{stream.rows_in_epoch} rows of {args.sequence_length} tokens, {stream.padding_share:.2%} padding")
    tokenizer = corpus.tokenizer()
    for (batch,), _ in islice(stream, args.rows):
        print("\n".join(row_lines(batch, tokenizer, args.objective, args.max_characters, args.block_size)))


if __name__ == "__main__":
    run(main)
