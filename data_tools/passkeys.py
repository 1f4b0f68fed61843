"""Writes texts with a passkey: what the needle task asks for, to train on.

    text ... The passkey is 4 8 2 1 3. Remember the passkey. ... text ... What is the passkey? The passkey is 4 8 2 1 3.

Each text is a passage of --input, or without it of made-up words, of a random number of words (log-uniform in
--words), in which a key of random digits is told at a random place, up to --copies times more at others, and asked for
at the end. Mix them into a corpus with `neomoba.data.train`. The input is held in memory. Writes
OUTPUT/documents-*.jsonl.zst and, last, OUTPUT/manifest.json; rerun it to resume. The same arguments give the same
bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import check_output, command_parser, natural_int, positive_int, progress, run
from neomoba_dist.data.errors import DataError

# apart from each other, digits are tokens of their own, whatever the tokenizer
NEEDLE = (" The passkey is", ". Remember the passkey.")
QUESTION = (" What is the passkey? The passkey is", ".")
KEY_DIGITS = 5  # by default
MADE_UP = 1 << 20  # words of a text of made-up ones, of which passages are taken


def write_text(
    words: Sequence[str], least: int, most: int, copies: int, draw: random.Random, digits: int = KEY_DIGITS
) -> str:
    """One text: `least` to `most` of the `words`, and what is said about the key, if it has digits."""
    key = "".join(f" {draw.randrange(10)}" for _ in range(digits))
    count = min(round(math.exp(draw.uniform(math.log(least), math.log(most)))), len(words))
    start = draw.randrange(len(words) - count + 1)
    if not digits:
        return " ".join(words[start : start + count])
    mentions = [f"{NEEDLE[0]}{key}{QUESTION[1]}"] * draw.randint(0, copies)
    mentions.insert(draw.randint(0, len(mentions)), f"{NEEDLE[0]}{key}{NEEDLE[1]}")
    cuts = sorted(draw.randint(0, count) for _ in mentions)
    text, last = "", 0
    for cut, mention in zip(cuts, mentions, strict=True):
        text += " " + " ".join(words[start + last : start + cut]) + mention
        last = cut
    return f"{text} {' '.join(words[start + last : start + count])}{QUESTION[0]}{key}{QUESTION[1]}".strip()


def made_up_words(count: int, draw: random.Random) -> list[str]:
    """Words of two syllables, some often and most rarely, as in a language (Zipf): 400 different ones."""
    syllables = [consonant + vowel for consonant in "bdgk" for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    return draw.choices(words, weights=[1 / rank for rank in range(1, len(words) + 1)], k=count)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("passkeys", __doc__)
    parser.add_argument("--input", nargs="+", help="txt, jsonl, parquet or folders (default: made-up words)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--documents", type=positive_int, required=True, metavar="N", help="texts to write")
    parser.add_argument(
        "--words",
        type=positive_int,
        nargs=2,
        default=[16, 1024],
        metavar=("LEAST", "MOST"),
        help="words of a text (default: 16 1024)",
    )
    parser.add_argument("--copies", type=natural_int, default=0, metavar="N", help="most further mentions (default: 0)")
    parser.add_argument(
        "--digits",
        type=natural_int,
        default=KEY_DIGITS,
        metavar="N",
        help=f"of a key (default: {KEY_DIGITS}); 0: passages without one, to hide keys in",
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="of keys and passages (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    args = parser.parse(argv)
    least, most = args.words
    if least > most:
        raise DataError(f"--words {least} {most}: give the smaller number first")
    check_output(args.output)

    from data_tools.cleaning import CleaningReport, Document, clean_documents
    from data_tools.sources import input_files, read_documents, refuse_input_in
    from data_tools.text_folder import TextFolder

    if args.input:
        report, files = CleaningReport(), input_files(args.input)
        refuse_input_in(args.output, files)
        documents = clean_documents(read_documents(files, report), report)
        words = [word for document in documents for word in document.text.split()]
    else:
        words = made_up_words(MADE_UP, random.Random(f"{args.seed}/words"))
    if not words:
        raise DataError(f"--input {' '.join(args.input)}: no text there; give files or folders with text")
    recipe = {"passkeys": args.documents, "words": args.words, "copies": args.copies, "seed": args.seed}
    recipe["digits"] = args.digits
    folder = TextFolder(args.output, {**recipe, "input": args.input, "input_words": len(words)}, args.overwrite)
    if folder.finished:
        print(f"{args.output}: whole already")
        return
    first = folder.state.get("next", 0)
    with progress(args.documents, "passkeys", "text") as bar:
        bar.update(first)
        for number in range(first, args.documents):
            text = write_text(words, least, most, args.copies, random.Random(f"{args.seed}/{number}"), args.digits)
            folder.add(Document(f"passkey-{number}", text, 0), partial(dict, next=number + 1))
            bar.update(1)
    folder.close({})
    print(f"{args.output}: {args.documents} texts of {least} to {most} words")


if __name__ == "__main__":
    run(main, resumes=True)
