"""launch/generate.py as its users start it."""

import subprocess
from pathlib import Path

import pytest
import torch

from launch.generate import main
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.corpus import Corpus
from tests.corpora import make_corpus
from tests.decoding import greedy_by_recomputing
from tests.evals.runs import make_config, write_run
from tests.programs import run_program

PROMPT = "def main(argument"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), "wordpiece")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program("launch/generate.py", *words)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_continues_the_prompt_as_the_model_would(decode: str, corpus: Corpus, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    prompt = PROMPT * 8  # more blocks than MoBA chooses
    result = run("--checkpoint", folder, "--prompt", prompt, "--max_new_tokens", "6", "--decode", decode)
    assert result.returncode == 0, result.stderr
    tokenizer = corpus.tokenizer()
    model, _ = load_model(folder, dtype=torch.float32)
    ids = tokenizer.wrap_document(tokenizer.encode(prompt))[:-1]
    assert len(ids) > 3 * 8
    expected = greedy_by_recomputing(model, ids, 6, decode)
    if tokenizer.special.sep in expected:
        expected = expected[: expected.index(tokenizer.special.sep)]
    together = tokenizer.decode([*tokenizer.encode(prompt), *expected])
    assert result.stdout == prompt + together.removeprefix(tokenizer.decode(tokenizer.encode(prompt))) + "\n"
    assert result.stderr == ""


def test_more_tokens_than_positions_is_a_warning(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm", max_position_embeddings=256))
    capsys.readouterr()
    for prompt, new, message in (
        ("x " * 400, "1", "warning: the prompt's 401 tokens are more than the 256 tokens"),
        ("x " * 250, "6", "warning: the prompt's 251 tokens and --max_new_tokens 6 are more than the 256 tokens"),
        ("x " * 250, "5", None),
    ):
        assert main(["--checkpoint", str(folder), "--prompt", prompt, "--max_new_tokens", new]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(prompt)
        assert said.err.count("\n") == (message is not None)
        assert said.err.startswith(message or "")


def test_what_is_wrong_takes_one_line(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = write_run(tmp_path / "encoder", make_config(corpus.folder, objective="mlm"))
    moved = write_run(tmp_path / "moved", make_config(tmp_path / "gone", objective="clm"))
    learned = make_config(corpus.folder, objective="clm", position_embedding="learned")
    short = write_run(tmp_path / "short", learned)
    capsys.readouterr()
    for words, message in (
        ((encoder,), 'neomoba.model.objective "mlm" does not continue text'),
        ((tmp_path / "nothing",), "no checkpoint here"),
        ((moved,), "no finished corpus"),
        ((short, "--max_new_tokens", "2000"), "positions that the model learned"),
        ((short, "--prompt", "x " * 1100), "the prompt's 1101 tokens are more than the 1024 positions that the model"),
        ((short, "--max_new_tokens", "0"), "give at least 1"),
    ):
        assert main(["--prompt", PROMPT, "--checkpoint", *map(str, words)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert message in said.err
        assert said.err.count("\n") == 1
