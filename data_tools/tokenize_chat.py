"""Turns prompts with their responses, or chats, into a folder of token shards of which the loss counts the answers.

A line of the jsonl files is {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}. The
tokenizer's chat template makes one text of the messages; prompt and response are those of a user and the assistant.
Without a template, prompt and response are laid end to end. Nothing is cut; texts are cleaned, and exact repetitions
dropped, as by tokenize_corpus. OUTPUT is what launch/pretrain.py reads: shards, tables, the tokenizer with its
template, and loss_spans.npz, which says what counts. A corpus that is there is replaced when the new one is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.cleaning import CLEANING_VERSION, CleaningReport, clean_text
from data_tools.cli import add_strict, check_output, command_parser, positive_float, progress, run
from data_tools.sources import SourceFile, input_files, read_records, total_bytes
from data_tools.tokenize_corpus import PARTS, holds, recipe_of, refuse_shards_of_others, remove_corpus
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from data_tools.corpus_index import CorpusCounts
    from neomoba_dist.data.chat import ChatTemplate, Dialogue
    from neomoba_dist.data.index import CorpusIndex, LossSpans
    from neomoba_dist.data.shards import ShardWriter
    from neomoba_dist.data.tokenizer import Tokenizer

COUNTED_AT_ONCE = 1000  # examples: each count costs a pass over the vocabulary


def messages_of(record: Any) -> list[dict[str, Any]]:
    """The messages of a line, with content of text, at least one of it an answer. ValueError says what is wrong."""
    from neomoba_dist.data.chat import check_messages

    if not isinstance(record, dict):
        raise ValueError("not a JSON object of prompt and response, or messages")
    if "messages" in record:
        messages = record["messages"]
    else:
        for key in ("prompt", "response"):
            if not isinstance(record.get(key), str) or not record[key].strip():
                raise ValueError(f"{key!r} is {'missing' if key not in record else 'empty or not a string'}")
        messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    check_messages(messages)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("no message of the assistant, or empty ones only")
    return messages


def encode_record(record: Any, tokenizer: Tokenizer, template: ChatTemplate | None) -> Dialogue:
    """The ids of a line, and which of them count. ValueError says what is wrong with it."""
    from neomoba_dist.data.chat import encode_pair, map_strings

    messages = map_strings(messages_of(record), clean_text)
    if template is not None:
        found = template.encode(messages)
    elif "messages" in record:
        raise DataError("--tokenizer: has no chat template, which messages need; give one with --chat-template FILE")
    else:
        found = encode_pair(messages[0]["content"], messages[1]["content"], tokenizer)
    if not found.spans:
        raise ValueError("the chat template leaves no answer of it")
    return found


def encode_records(
    files: list[SourceFile], tokenizer: Tokenizer, template: ChatTemplate | None, report: CleaningReport
) -> Iterator[Dialogue]:
    """The lines of all files that can be used, each once; the others are counted in the report."""
    seen: set[bytes] = set()
    with progress(total_bytes(files), "tokenize", "B") as bar:
        for where, record, raw_bytes in read_records(files, report):
            bar.update(raw_bytes)
            report.documents += 1
            try:
                found = encode_record(record, tokenizer, template)
            except ValueError as reason:
                report.no_text(where, str(reason))
                continue
            digest = hashlib.blake2b(repr((found.ids, found.spans)).encode("ascii"), digest_size=16).digest()
            if digest in seen:
                report.duplicates += 1
                continue
            seen.add(digest)
            yield found


def tokenize_chat(
    files: list[SourceFile],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    output: Path,
    shard_bytes: int,
    recipe: str,
    *,
    strict: bool = False,
) -> CorpusIndex:
    """Makes the corpus in `output`. DataError, before anything there is replaced, if no line can be used."""
    from data_tools.corpus_index import CorpusCounts, write_index
    from data_tools.unknown import UnknownText
    from neomoba_dist.data.index import INDEX_FILE
    from neomoba_dist.data.shards import ShardWriter, id_dtype

    refuse_shards_of_others(output)
    unfinished = output / PARTS
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save(unfinished)
    if template is not None:
        template.save(unfinished)
    dtype = id_dtype(tokenizer.vocab_size)
    writer, counts = ShardWriter(unfinished, dtype, shard_bytes), CorpusCounts(tokenizer.vocab_size)
    report = CleaningReport(strict=strict)
    try:
        spans, rewritten = write_examples(encode_records(files, tokenizer, template, report), writer, counts)
        if not counts.lengths:
            raise report.nothing_left()
        known, unknown = counts.known_and_unknown(tokenizer)
        UnknownText(tokens=known + unknown, unknown_tokens=unknown).report(True, "use the tokenizer of the model")
    except DataError:
        shutil.rmtree(unfinished)
        raise
    index = write_index(unfinished, counts, tokenizer, dtype, *writer.close(), recipe, loss_spans=spans)
    remove_corpus(output)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == INDEX_FILE):  # the index last
        file.replace(output / file.name)
    unfinished.rmdir()
    lines = report.lines()
    if rewritten:
        lines.append(f"{rewritten} answers do not count: the chat template writes them otherwise when messages follow")
    counted = int((spans.stops - spans.starts).sum())
    lines.append(f"{index.documents} examples, {index.tokens} tokens, of which {counted / index.tokens:.1%} count")
    print("\n".join(lines))
    return index


def write_examples(examples: Iterable[Dialogue], writer: ShardWriter, counts: CorpusCounts) -> tuple[LossSpans, int]:
    """Writes and counts the examples. Returns which tokens of the corpus count, and how many answers are rewritten."""
    import numpy as np

    from neomoba_dist.data.index import LossSpans

    spans: list[tuple[int, int]] = []
    waiting: list[np.ndarray] = []
    tokens = rewritten = 0
    for example in examples:
        ids = np.array(example.ids)
        writer.add(ids)
        waiting.append(ids)
        if len(waiting) == COUNTED_AT_ONCE:
            counts.add(waiting)
            waiting = []
        spans += [(tokens + start, tokens + stop) for start, stop in example.spans]
        tokens, rewritten = tokens + len(ids), rewritten + example.rewritten
    counts.add(waiting)
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T.copy()
    return LossSpans(starts=starts, stops=stops), rewritten


def keys_of(files: list[SourceFile], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """What decides the examples: the cleaning's version, digests of the tokenizer, the template and each file."""
    said = "" if template is None else repr((template.source, sorted(template.variables.items())))
    keys = [str(CLEANING_VERSION), tokenizer.sha256, hashlib.sha256(said.encode("utf-8")).hexdigest()]
    for file in files:
        with open(file.path, "rb") as payload:
            keys.append(hashlib.file_digest(payload, "sha256").hexdigest())
    return keys


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("tokenize_chat", __doc__)
    parser.add_argument("--input", nargs="+", required=True, help="jsonl (.gz, .zst), or folders of them")
    parser.add_argument("--tokenizer", required=True, help="the model's: a folder or file, as tokenize_corpus takes it")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards to write")
    parser.add_argument("--chat_template", metavar="FILE|none", help="default: the one beside the tokenizer, if any")
    parser.add_argument("--shard_mb", type=positive_float, default=128.0, help="size of a shard in MB (default: 128)")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in OUTPUT")
    add_strict(parser)
    args = parser.parse(argv)
    check_output(args.output)

    from neomoba_dist.data.chat import load_chat_template
    from neomoba_dist.data.tokenizer import load_tokenizer

    files = input_files(args.input)
    if others := [file.path for file in files if ".jsonl" not in file.path.suffixes]:
        raise DataError(f"--input {others[0]}: give .jsonl, .jsonl.gz or .jsonl.zst files of prompts and responses")
    tokenizer = load_tokenizer(args.tokenizer)
    template = None
    if args.chat_template != "none":
        template = load_chat_template(args.tokenizer, tokenizer, args.chat_template)
    shard_bytes = int(args.shard_mb * 1e6)
    recipe = recipe_of(keys_of(files, tokenizer, template), shard_bytes)
    if not args.overwrite and holds(args.output, recipe):
        print(f"{args.output}: already holds these examples, nothing to do")
        return
    tokenize_chat(files, tokenizer, template, args.output, shard_bytes, recipe, strict=args.strict)


if __name__ == "__main__":
    run(main)
