"""Turns text into a folder of token shards that training reads.

Each document is cleaned, tokenised whole (no truncation) and wrapped: [CLS] document [SEP], or document and the
end-of-text token where the tokenizer has no [CLS] and [SEP]. Exact repetitions are dropped. The result is the same,
byte for byte, for any number of workers. An interrupted run goes on where it stopped; a finished one is left alone.
Writes OUTPUT/shard-*.tar (plain WebDataset tars), the tokenizer, members.npz and, last, index.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.clean import CleaningReport
from data_tools.cli import command_parser, positive_float, positive_int, progress, run
from data_tools.sources import SourceFile, input_files, read_documents, total_bytes
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from neomoba_dist.data.index import CorpusIndex
    from neomoba_dist.data.tokenizer import Tokenizer

_PARTS = ".parts"


def recipe_of(keys: list[str], shard_bytes: int) -> str:
    """Digest of everything that decides the bytes of the shards."""
    from neomoba_dist.data.index import FORMAT, VERSION
    from neomoba_dist.data.shards import MEMBER_TOKENS

    facts = [FORMAT, VERSION, MEMBER_TOKENS, shard_bytes, keys]
    return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()


def is_finished(output: Path, files: list[SourceFile], tokenizer: Tokenizer, shard_bytes: int) -> bool:
    """True if OUTPUT holds exactly this corpus, False if it holds nothing finished or a damaged one of this recipe;
    DataError if it holds another corpus."""
    from data_tools.blocks import divide
    from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
    from neomoba_dist.data.shards import structural_problems

    if not (output / INDEX_FILE).is_file():
        return False
    index = CorpusIndex.from_file(output / INDEX_FILE)
    keys = []
    with progress(total_bytes(files), "compare with OUTPUT", "B") as bar:
        for block in divide(read_documents(files, CleaningReport()), tokenizer.sha256):
            keys.append(block.key)
            bar.update(block.raw_bytes)
    if index.recipe != recipe_of(keys, shard_bytes):
        raise DataError(f"{output}: holds a corpus of other text or settings; add --overwrite or change --output")
    return not structural_problems(output, index.shards)


def write_shards(output: Path, parts: list[Path], tokenizer: Tokenizer, shard_bytes: int, recipe: str) -> CorpusIndex:
    """Assembles the parts, in order, into shards and writes the index last."""
    from data_tools.blocks import Part
    from data_tools.corpus_index import CorpusCounts, write_index
    from neomoba_dist.data.index import INDEX_FILE
    from neomoba_dist.data.shards import ShardWriter, id_dtype

    # the index goes first: without it nothing in the folder counts as finished
    (output / INDEX_FILE).unlink(missing_ok=True)
    for stale in (*output.glob("*.tar"), *output.glob(".*.tmp"), *output.glob("tokenizer.*")):
        stale.unlink()
    tokenizer.save(output)
    dtype = id_dtype(tokenizer.vocab_size)
    writer = ShardWriter(output, dtype, shard_bytes)
    counts = CorpusCounts(tokenizer.vocab_size)
    empty = duplicates = 0
    seen: set[bytes] = set()
    with progress(len(parts), "write shards", "block") as bar:
        for path in parts:
            kept = []
            for ids, digest in Part.from_file(path).documents():
                if not len(ids):
                    empty += 1
                elif digest in seen:
                    duplicates += 1
                else:
                    seen.add(digest)
                    writer.add(ids)
                    kept.append(ids)
            counts.add(kept)
            bar.update(1)
    if not counts.lengths:
        raise DataError("--input: no text left after cleaning")
    shards, members = writer.close()
    print(f"dropped {empty} empty and {duplicates} repeated documents")
    return write_index(output, counts, tokenizer, dtype, shards, members, recipe)


def tokenize_corpus(
    files: list[SourceFile], tokenizer: Tokenizer, output: Path, workers: int, shard_bytes: int
) -> CorpusIndex:
    """Makes the corpus in `output`, going on from the parts that an interrupted run left there."""
    from data_tools.blocks import Block, divide, tokenize_blocks

    parts_folder = output / _PARTS
    parts_folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    report = CleaningReport()
    with progress(total_bytes(files), "tokenize", "B") as bar:

        def done(block: Block) -> None:
            parts.append(block.part(parts_folder))
            bar.update(block.raw_bytes)

        blocks = divide(read_documents(files, report), tokenizer.sha256)
        keys = tokenize_blocks(blocks, tokenizer, parts_folder, workers, done)
    for line in report.lines():
        print(line)
    index = write_shards(output, parts, tokenizer, shard_bytes, recipe_of(keys, shard_bytes))
    shutil.rmtree(parts_folder)
    return index


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("tokenize_corpus", __doc__)
    parser.add_argument("--input", nargs="+", required=True, help="txt, jsonl, parquet or folders of them")
    kinds = "folder of train_tokenizer, tokenizer.json, BERT's vocab.txt, GPT-2's encoder.json, SentencePiece .model"
    parser.add_argument("--tokenizer", required=True, help=kinds)
    parser.add_argument("--output", type=Path, required=True, help="folder of shards to write")
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--shard_mb", type=positive_float, default=128.0, help="size of a shard in MB (default: 128)")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in OUTPUT")
    args = parser.parse(argv)

    from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
    from neomoba_dist.data.tokenizer import load_tokenizer

    files = input_files(args.input)
    tokenizer = load_tokenizer(args.tokenizer)
    shard_bytes = int(args.shard_mb * 1e6)
    began = time.monotonic()
    if not args.overwrite and is_finished(args.output, files, tokenizer, shard_bytes):
        index = CorpusIndex.from_file(args.output / INDEX_FILE)
        print(f"{args.output}: already holds this corpus, nothing to do")
    else:
        index = tokenize_corpus(files, tokenizer, args.output, args.workers, shard_bytes)
    print(
        f"{args.output}: {index.documents} documents, {index.tokens} tokens in {len(index.shards)} shards, "
        f"unigram entropy {index.unigram_entropy:.3f} nats/token, {time.monotonic() - began:.1f} s"
    )


if __name__ == "__main__":
    run(main)
