"""An encoder-decoder from text to filled gaps, by the commands that its users start."""

import json
from pathlib import Path

import pytest

from tests.chats import write_jsonl
from tests.programs import run_program
from tests.runs import metrics

SENTENCE = (
    "the old man walked down to river every morning before sunrise and counted seven white boats that waited near "
    "a broken bridge while his young dog slept under green trees"
)
WORDS, GAP = SENTENCE.split(), 4  # what a text of 26 to 30 tokens loses, in one span


@pytest.mark.full
def test_trained_on_one_sentence_it_knows_what_is_missing(tmp_path: Path) -> None:
    """The decoder's start, the sentinels and the borders of a prompt must be those of training for this."""
    cuts = [(start, end) for start in range(8) for end in range(len(WORDS) - 7, len(WORDS) + 1)]
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[start:end])} for start, end in cuts])
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    changes = {
        "neomoba.data.train": corpus, "neomoba.data.validation": corpus, "neomoba.model.vocab_size": 300,
        "train_micro_batch_size_per_gpu": 4, "neomoba.phase.tokens_per_update": 1024, "neomoba.phase.steps": 150,
        "neomoba.phase.learning_rate": 3e-3, "neomoba.phase.warmup_steps": 10, "neomoba.log.tensorboard": "false",
    }  # fmt: skip
    prompts = [[*WORDS[:at], "<extra_id_0>", *WORDS[at + GAP :]] for at in range(1, len(WORDS) - GAP)]
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": " ".join(prompt)} for prompt in prompts])
    for words in (
        ("-m", "data_tools.train_tokenizer", "--input", texts, "--output", tmp_path / "tokenizer",
         "--vocab_size", "300", "--sentinels", "16"),
        ("-m", "data_tools.tokenize_corpus", "--input", texts, "--tokenizer", tmp_path / "tokenizer",
         "--output", corpus),
        ("launch/pretrain.py", "--ds_config", "ds_configs/cpu_tiny_encdec.json", "--output_dir", run,
         "--set", *(f"{key}={value}" for key, value in changes.items())),
        ("launch/generate.py", "--checkpoint", run, "--prompt-file", tmp_path / "in.jsonl", "--max_new_tokens", "16",
         "--output", tmp_path / "out.jsonl"),
        ("-m", "evals", "run", "--tasks", "validation_loss", "--checkpoint", run, "--output", tmp_path / "scores"),
    ):  # fmt: skip
        result = run_program(*words, timeout=250)
        assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = [f"<extra_id_0> {' '.join(WORDS[at : at + GAP])}" for at in range(1, len(WORDS) - GAP)]
    right = [entry["text"] == text for entry, text in zip(found, wanted, strict=True)]
    assert sum(right) > len(right) / 2, found
    assert all(entry["finish_reason"] == "stop" for entry, ok in zip(found, right, strict=True) if ok)
    logged = [line["validation_loss"] for line in metrics(run) if "validation_loss" in line]
    (sparse, _) = json.loads((tmp_path / "scores" / "validation_loss.json").read_text())["rows"]
    assert (sparse["name"], sparse["value"]) == ("moba", pytest.approx(logged[-1], rel=1e-5))
