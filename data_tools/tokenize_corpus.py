"""Turns text into a folder of token shards that training reads.

Each document is cleaned, tokenised whole (no truncation) and wrapped: [CLS] document [SEP], or document and the
end-of-text token where the tokenizer has no [CLS] and [SEP]. Exact repetitions are dropped. The result is the same,
byte for byte, for any number of workers. An interrupted run goes on where it stopped; a finished one is left alone.
Writes OUTPUT/shard-*.tar (plain WebDataset tars), the tokenizer, two tables and, last, index.json.

On many machines: mpirun -n K python -m data_tools.tokenize_corpus --mpi ...; rank 0 reads, the others tokenise, OUTPUT
lies on a file system that all of them share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_tools.cleaning import CleaningReport
from data_tools.cli import add_strict, check_output, command_parser, positive_float, positive_int, progress, run
from data_tools.sources import SourceFile, input_files, read_documents, total_bytes
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from neomoba_dist.data.index import CorpusIndex
    from neomoba_dist.data.tokenizer import Tokenizer

PARTS = ".parts"


def recipe_of(keys: list[str], shard_bytes: int) -> str:
    """Digest of everything that decides the bytes of the shards."""
    from neomoba_dist.data.index import FORMAT, VERSION
    from neomoba_dist.data.shards import MEMBER_TOKENS

    facts = [FORMAT, VERSION, MEMBER_TOKENS, shard_bytes, keys]
    return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()


def is_finished(
    output: Path, files: list[SourceFile], tokenizer: Tokenizer, shard_bytes: int, strict: bool = False
) -> bool:
    """True if OUTPUT holds exactly this corpus, False if it holds nothing finished or a damaged one of this recipe;
    DataError if it holds another corpus."""
    from data_tools.blocks import divide
    from neomoba_dist.data.index import INDEX_FILE

    if not (output / INDEX_FILE).is_file():
        return False
    keys = []
    with progress(total_bytes(files), "compare with OUTPUT", "B") as bar:
        for block in divide(read_documents(files, CleaningReport(strict=strict)), tokenizer):
            keys.append(block.key)
            bar.update(block.raw_bytes)
    return holds(output, recipe_of(keys, shard_bytes))


def holds(output: Path, recipe: str) -> bool:
    """True if OUTPUT holds the corpus of this recipe, False if nothing finished or a damaged one; DataError if it holds
    another corpus."""
    from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
    from neomoba_dist.data.shards import structural_problems

    if not (output / INDEX_FILE).is_file():
        return False
    index = CorpusIndex.from_file(output / INDEX_FILE)
    if index.recipe != recipe:
        raise DataError(f"{output}: holds a corpus of other text or settings; add --overwrite or change --output")
    return not structural_problems(output, index.shards)


def refuse_shards_of_others(output: Path) -> None:
    """DataError if OUTPUT holds tar files that this command did not write: they would be deleted."""
    from data_tools.foreign import is_foreign
    from neomoba_dist.data.index import INDEX_FILE

    ours = (output / PARTS).is_dir() or ((output / INDEX_FILE).is_file() and not is_foreign(output / INDEX_FILE))
    if not ours and any(output.glob("*.tar")):
        raise DataError(f"{output}: holds tar files of another origin; change --output")


def remove_corpus(output: Path) -> None:
    """Takes an earlier corpus out of OUTPUT."""
    from neomoba_dist.data.chat import SETTINGS_FILE
    from neomoba_dist.data.index import INDEX_FILE, LOSS_SPANS_FILE

    # the index goes first: without it nothing in the folder counts as finished
    (output / INDEX_FILE).unlink(missing_ok=True)
    if (output / LOSS_SPANS_FILE).is_file():  # of tokenize_chat, which also writes the chat template
        (output / SETTINGS_FILE).unlink(missing_ok=True)
        (output / LOSS_SPANS_FILE).unlink()
    for stale in (*output.glob("*.tar"), *output.glob(".*.tmp"), *output.glob("tokenizer.*")):
        stale.unlink()


def write_shards(
    output: Path, parts: list[Path], tokenizer: Tokenizer, shard_bytes: int, recipe: str, unknown_text_share: float
) -> CorpusIndex:
    """Assembles the parts, in order, into shards and writes the index last."""
    from data_tools.blocks import read_parts
    from data_tools.corpus_index import CorpusCounts, write_index
    from neomoba_dist.data.shards import ShardWriter, id_dtype

    remove_corpus(output)
    tokenizer.save(output)
    dtype = id_dtype(tokenizer.vocab_size)
    writer = ShardWriter(output, dtype, shard_bytes)
    counts = CorpusCounts(tokenizer.vocab_size)
    report = CleaningReport()
    seen: set[bytes] = set()
    with progress(len(parts), "write shards", "block") as bar:
        for documents in read_parts(parts):
            kept = []
            for ids, digest in documents:
                report.documents += 1
                if not len(ids):
                    report.empty += 1
                elif digest in seen:
                    report.duplicates += 1
                else:
                    seen.add(digest)
                    writer.add(ids)
                    kept.append(ids)
            counts.add(kept)
            bar.update(1)
    if not counts.lengths:
        raise DataError("--input: no text left after cleaning")
    shards, members = writer.close()
    for line in report.lines():
        print(line)
    return write_index(output, counts, tokenizer, dtype, shards, members, recipe, unknown_text_share)


def tokenize_corpus(
    files: list[SourceFile],
    tokenizer: Tokenizer,
    output: Path,
    workers: int,
    shard_bytes: int,
    pool: Executor | None = None,
    *,
    strict: bool = False,
    allow_unknown: bool = False,
) -> CorpusIndex:
    """Makes the corpus in `output`, going on from the parts that an interrupted run left there.

    The work is done by `pool`, which has `workers` workers; without one by processes of this machine. DataError, before
    anything in `output` is replaced, if most of the text is unknown to the tokenizer, unless `allow_unknown`."""
    from data_tools.blocks import Block, divide, tokenize_blocks, worker_pool
    from data_tools.unknown import UnknownText

    refuse_shards_of_others(output)
    parts_folder = output / PARTS
    parts_folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    report, unknown = CleaningReport(strict=strict), UnknownText()
    own_pool = worker_pool(workers) if pool is None and workers > 1 else nullcontext(pool)
    with progress(total_bytes(files), "tokenize", "B") as bar, own_pool as executor:

        def done(block: Block) -> None:
            parts.append(block.part(parts_folder))
            unknown.add_part(parts[-1])
            bar.update(block.raw_bytes)

        blocks = divide(read_documents(files, report), tokenizer)
        keys = tokenize_blocks(blocks, tokenizer, parts_folder, executor, workers, done)
    for line in report.lines():
        print(line)
    unknown.report(allow_unknown, "train one on this text: python -m data_tools.train_tokenizer --kind byte_bpe")
    index = write_shards(output, parts, tokenizer, shard_bytes, recipe_of(keys, shard_bytes), unknown.text_share)
    shutil.rmtree(parts_folder)
    return index


def run_under_mpi(work: Callable[[Executor, int], None]) -> None:
    """Calls `work(pool, workers)` on rank 0, with all other ranks as the pool; these serve until it returns.

    DataError where mpi4py knows of another number of ranks than were started: each would do all the work.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    from neomoba_dist.parallel.launcher import launched_size

    if (started := launched_size()) != (size := MPI.COMM_WORLD.size):
        library = " ".join(MPI.Get_library_version().split("\n")[0].split())
        raise DataError(
            f"{started} processes were started, but mpi4py runs on {library}, which knows of {size}; start them with "
            "the mpirun of that MPI, or srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI)"
        )
    with cast("AbstractContextManager[Executor | None]", MPICommExecutor(MPI.COMM_WORLD, root=0)) as pool:
        if pool is None:
            return
        if MPI.COMM_WORLD.size == 1:
            library = MPI.Get_library_version().split("\n")[0]
            print(f"one process under {library}: start it with the mpirun of this MPI, mpirun -n K, for more")
        work(pool, max(1, MPI.COMM_WORLD.size - 1))


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
    add_strict(parser)
    parser.add_argument("--allow_unknown", action="store_true", help="also if the tokenizer knows less than half of it")
    parser.add_argument("--mpi", action="store_true", help="work on the ranks of mpirun instead of --workers processes")
    args = parser.parse(argv)
    check_output(args.output)

    def work(pool: Executor | None, workers: int) -> None:
        from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
        from neomoba_dist.data.tokenizer import load_tokenizer

        files = input_files(args.input)
        tokenizer = load_tokenizer(args.tokenizer)
        shard_bytes = int(args.shard_mb * 1e6)
        began = time.monotonic()
        if not args.overwrite and is_finished(args.output, files, tokenizer, shard_bytes, args.strict):
            index = CorpusIndex.from_file(args.output / INDEX_FILE)
            print(f"{args.output}: already holds this corpus, nothing to do")
        else:
            flags = {"strict": args.strict, "allow_unknown": args.allow_unknown}
            index = tokenize_corpus(files, tokenizer, args.output, workers, shard_bytes, pool, **flags)
        print(
            f"{args.output}: {index.documents} documents, {index.tokens} tokens in {len(index.shards)} shards, "
            f"unigram entropy {index.unigram_entropy:.3f} nats/token, {index.unknown}, {time.monotonic() - began:.1f} s"
        )

    if args.mpi:
        run_under_mpi(work)
    else:
        work(None, args.workers)


if __name__ == "__main__":
    run(main, resumes=True)
