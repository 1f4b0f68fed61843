"""Tiny files in GLUE's formats that a model can learn: the label hangs on one word."""

import json
import random
from pathlib import Path

WORDS = ("the", "argument", "parser", "returns", "a", "value", "of", "some", "type", "in", "this", "function")
MARKS = ("class", "return", "string")  # one word per label


def sentence(draw: random.Random, mark: str = "") -> str:
    words = [draw.choice(WORDS) for _ in range(draw.randrange(4, 12))]
    words.insert(draw.randrange(len(words) + 1), mark)
    return " ".join(filter(None, words))


def write_tsv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n", encoding="utf-8")


def write_sst2(folder: Path, train: int = 64, dev: int = 24) -> Path:
    draw = random.Random(1)
    for split, number in (("train", train), ("dev", dev)):
        rows = [[sentence(draw, MARKS[i % 2]), str(i % 2)] for i in range(number)]
        write_tsv(folder / "SST-2" / f"{split}.tsv", ["sentence", "label"], rows)
    rows = [[str(i), sentence(draw, MARKS[i % 2])] for i in range(5)]
    write_tsv(folder / "SST-2" / "test.tsv", ["index", "sentence"], rows)
    return folder


def write_mnli_and_rte(folder: Path) -> Path:
    draw = random.Random(2)
    names, pair = ("entailment", "neutral", "contradiction"), ["sentence1", "sentence2"]
    for split, number in (("train", 48), ("dev_matched", 12), ("dev_mismatched", 12)):
        rows = [[sentence(draw), sentence(draw, MARKS[i % 3]), names[i % 3]] for i in range(number)]
        write_tsv(folder / "MNLI" / f"{split}.tsv", [*pair, "gold_label"], rows)
    for split in ("test_matched", "test_mismatched"):
        write_tsv(
            folder / "MNLI" / f"{split}.tsv",
            ["index", *pair],
            [[str(i), sentence(draw), sentence(draw, MARKS[i % 3])] for i in range(3)],
        )
    for split in ("train", "dev"):
        rows = [
            [str(i), sentence(draw), sentence(draw, MARKS[i % 2]), ("entailment", "not_entailment")[i % 2]]
            for i in range(24)
        ]
        write_tsv(folder / "RTE" / f"{split}.tsv", ["index", *pair, "label"], rows)
    return folder


def write_pairs(path: Path, number: int, seed: int, negatives: bool = True) -> Path:
    """A positive repeats most words of its query."""
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(number):
            query = sentence(draw, draw.choice(MARKS))
            record = {"query": query, "positive": " ".join(query.split()[1:])}
            file.write(json.dumps(record | ({"negative": sentence(draw)} if negatives else {})) + "\n")
    return path
