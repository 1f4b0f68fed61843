"""Next-sentence prediction is learned: on texts that are each about one of a few subjects, far above chance."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import data_tools.tokenize_corpus as command
from data_tools.sources import input_files
from data_tools.train_tokenizer import KINDS
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.pairs import PAIRS
from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

SUBJECTS, WORDS = 8, 40  # words of each subject
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def write_subjects(folder: Path, name: str, number: int, seed: int) -> Path:
    """Texts of 40 to 60 words of one subject and 10 to 20 of no subject, as jsonl in a folder."""
    names = random.Random(0)
    words = ["".join(names.sample(SYLLABLES, 3)) for _ in range(WORDS * (SUBJECTS + 1))]
    draw = random.Random(seed)
    (folder / name).mkdir(parents=True)
    with open(folder / name / "texts.jsonl", "w", encoding="utf-8") as file:
        for index in range(number):
            subject = draw.randrange(SUBJECTS)
            text = draw.choices(words[subject * WORDS :][:WORDS], k=draw.randrange(40, 60))
            text += draw.choices(words[SUBJECTS * WORDS :], k=draw.randrange(10, 20))
            draw.shuffle(text)
            file.write(json.dumps({"id": str(index), "text": " ".join(text)}) + "\n")
    return folder / name


def make_corpora(folder: Path) -> dict[str, str]:
    """Shards to train and to validate on, by the key of neomoba.data."""
    texts = {
        name: write_subjects(folder, name, number, seed)
        for name, number, seed in (("train", 4000, 1), ("validation", 200, 2))
    }
    lines = (texts["train"] / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    payload = KINDS["wordpiece"]([json.loads(line)["text"] for line in lines], 600)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(payload)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, text in texts.items():
        command.tokenize_corpus(input_files([text]), tokenizer, folder / "shards" / name, 1, 10_000_000)
    return {name: str(folder / "shards" / name) for name in texts}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_accuracy_rises_above_chance(tmp_path: Path) -> None:
    model: dict[str, Any] = {
        **PAIRS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    phase = {"sequence_length": 512, "tokens_per_update": 4096, "steps": 300, "learning_rate": 3e-3, "warmup_steps": 30}
    config = run_config({}, model=model, full_attention_fraction=1.0, checkpoint={"save_every": 1000}, **phase)
    config = replace(
        config,
        data=replace(config.data, packing="whole", **make_corpora(tmp_path)),
        log=replace(config.log, validate_every=50, validation_rows=32),
    )
    run_ranks(1, train_here, config, tmp_path / "run", 300, timeout=1200)
    for line in metrics(tmp_path / "run"):
        if "validation_next_sentence_accuracy" in line:
            print(line["step"], {key: round(value, 3) for key, value in line.items() if "validation" in key})
    last = metrics(tmp_path / "run")[-1]
    assert last["validation_next_sentence_accuracy"] > 0.75
    assert last["validation_next_sentence_loss"] < 0.6
