"""The commands: end to end from the shell, restart, the same bytes for any number of workers, cleaning and sources."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import data_tools.blocks as blocks
import data_tools.tokenize_corpus as tokenize_command
from data_tools import cli, inspect_shards, sample_corpus, train_tokenizer, verify_shards
from data_tools.cleaning import clean_text
from data_tools.sources import standard_library_files
from evals.__main__ import main as evaluate
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import load_tokenizer
from neomoba_dist.errors import FAILED, MISTAKE
from tests.corpora import SHARED_DATA, folder_digests, make_tokenizer, write_texts
from tests.programs import ROOT, run_program

COMMANDS = (
    "fetch",
    "clean",
    "sample_corpus",
    "train_tokenizer",
    "tokenize_corpus",
    "tokenize_chat",
    "index",
    "verify_shards",
    "inspect_shards",
    "plan_rows",
)


def _run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program("-m", f"data_tools.{command}", *arguments)


def _succeed(command: str, *arguments: object) -> str:
    result = _run(command, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "byte_bpe")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command: str) -> None:
    # processor time: what the command itself needs, however busy the machine is
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", f"data_tools.{command}", "--help"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "usage: python -m data_tools." in result.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_from_text_to_rows(tmp_path: Path) -> None:
    text, tokenizer, shards = tmp_path / "text", tmp_path / "tokenizer", tmp_path / "shards"
    _succeed("sample_corpus", "--output", text, "--max-mb", 0.4)
    _succeed("train_tokenizer", "--input", text / "train", "--output", tokenizer, "--vocab_size", 1000)
    said = {}
    for split in ("train", "validation"):
        said[split] = _succeed(
            "tokenize_corpus",
            "--input",
            text / split,
            "--tokenizer",
            tokenizer,
            "--output",
            shards / split,
            "--workers=2",
        )
        corpus = open_corpus(shards / split)
        assert f"{corpus.documents} documents, {corpus.tokens} tokens in 1 shards" in said[split]
        assert f"unigram entropy {corpus.unigram_entropy:.3f} nats/token" in said[split]
        assert 4.0 < corpus.unigram_entropy < 6.9  # ln(1000) = 6.91
    assert open_corpus(shards / "train").documents > open_corpus(shards / "validation").documents > 0
    assert "as the index says" in _succeed("verify_shards", shards / "train", shards / "validation")
    shown = _succeed("inspect_shards", shards / "train", "--sequence_length", 128, "--rows", 3)
    assert "documents by length" in shown
    assert ">[MASK]}" in shown
    assert shown.count("of 128 tokens have a label") == 3
    assert "subset 1024+: " in shown

    shard = shards / "train" / "shard-00000.tar"
    payload = bytearray(shard.read_bytes())
    payload[2000] ^= 1
    shard.write_bytes(payload)
    result = _run("verify_shards", shards / "train")
    assert result.returncode == FAILED
    assert f"{shard}: offset 512: " in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: 1 problems")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample_corpus", "--output", "x", "--input", "none.txt"), "error: --input none.txt: no such file or folder"),
        (("sample_corpus",), "error: the following arguments are required: --output; see"),
        (
            ("train_tokenizer", "--input", "x", "--output", "y", "--kind", "words"),
            "error: argument --kind: invalid choice",
        ),
        (
            ("tokenize_corpus", "--input", "README.md", "--output", "x", "--tokenizer", "y"),
            "error: --input README.md: ",
        ),
        (
            ("tokenize_corpus", "--input", "x", "--tokenizer", "y", "--output", "z", "--workers", "0"),
            "--workers: '0' is",
        ),
        (("verify_shards", "none"), "error: none: no finished corpus"),
        (("inspect_shards", "none"), "error: folder: no finished corpus in none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = _run(*arguments)
    assert result.returncode == MISTAKE
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interruption_says_what_the_next_run_does(resumes: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(interrupted, resumes=resumes)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(" goes on where it stopped\n" if resumes else " begins again\n")


def test_another_corpus_is_not_overwritten_unasked(tmp_path: Path, tokenizer: Path) -> None:
    for name, text in (("a.txt", "one text\n"), ("b.txt", "another text\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    common = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "shards"), "--workers", "1", "--input"]
    tokenize_command.main([*common, str(tmp_path / "a.txt")])
    first = open_corpus(tmp_path / "shards").fingerprint
    with pytest.raises(DataError, match="--overwrite"):
        tokenize_command.main([*common, str(tmp_path / "b.txt")])
    assert open_corpus(tmp_path / "shards").fingerprint == first
    tokenize_command.main([*common, str(tmp_path / "b.txt"), "--overwrite"])
    assert open_corpus(tmp_path / "shards").fingerprint != first

    # another tokenizer at the same place, in the same process
    other = make_tokenizer(tmp_path / "other", "bpe", vocab_size=600)
    common[1] = str(other)
    tokenize_command.main([*common, str(tmp_path / "b.txt"), "--overwrite"])
    corpus = open_corpus(tmp_path / "shards")
    assert corpus.tokenizer().file_name == "tokenizer.model"
    assert not (tmp_path / "shards" / "tokenizer.json").exists()
    assert list(verify_shards.corpus_problems(corpus.folder)) == []


def test_trained_tokenizer_is_kept(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text")
    common = ["--input", str(text), "--output", str(tmp_path / "tokenizer"), "--kind", "wordpiece", "--vocab_size"]
    train_tokenizer.main([*common, "800"])
    first = folder_digests(tmp_path / "tokenizer")
    train_tokenizer.main([*common, "800"])
    assert folder_digests(tmp_path / "tokenizer") == first
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer.main([*common, "900"])
    train_tokenizer.main([*common, "900", "--overwrite"])
    assert folder_digests(tmp_path / "tokenizer") != first


def test_wordpiece_training_is_deterministic(tmp_path: Path) -> None:
    """In processes of their own, whose hash maps have other seeds; "##" in a text is no token."""
    write_texts(tmp_path / "text")
    for run in "ab":
        _succeed("train_tokenizer", "--input", tmp_path / "text", "--output", tmp_path / run, "--vocab_size", 2000)
    first, second = ((tmp_path / run / "tokenizer.json").read_bytes() for run in "ab")
    assert first == second
    vocabulary = json.loads(first)["model"]["vocab"]
    assert "##e" in vocabulary
    assert vocabulary["##e"] not in load_tokenizer(tmp_path / "a").encode("##e")


def test_bench_compares_preparation_with_the_library(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_texts(tmp_path / "text")
    common = ["bench", "prepare", "--input", str(text), "--tokenizer", str(tokenizer), "--output", str(tmp_path)]
    assert evaluate([*common, "--megabytes", "1", "--repetitions", "1"]) == 0
    assert "prepare Mtok/CPU-s" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "prepare.json").read_text(encoding="utf-8"))["rows"].values()
    assert row["tokens"] > 100_000
    assert row["ratio"] == row["library_seconds"] / row["prepare_seconds"] > 0.1


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_inspect_shows_documents_blocks_and_masks(
    tmp_path: Path, tokenizer: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents of 70, 30 and 20 tokens in a row of 128, blocks of 32."""
    words = [" ".join(f"{name}{i}" for i in range(40)) for name in "abc"]
    encode = load_tokenizer(tokenizer).encode
    texts = [load_tokenizer(tokenizer).decode(encode(text)[:n]) for text, n in zip(words, (68, 28, 18), strict=True)]
    lengths = [len(encode(text)) + 2 for text in texts]
    assert lengths == [70, 30, 20]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    common = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "s"), "--workers", "1"]
    tokenize_command.main(["--input", str(tmp_path / "in.jsonl"), *common])
    capsys.readouterr()
    options = ["--sequence_length", "128", "--rows", "1", "--block_size", "32", "--objective", objective]
    inspect_shards.main([str(tmp_path / "s"), *options, "--max_characters", "100000"])
    lines = capsys.readouterr().out.splitlines()
    assert "[0, 70) document of 70 tokens" in "\n".join(lines)
    blocks = [line.split(": ", 1) for line in lines if line.startswith("    block ")]
    assert [head for head, _ in blocks] == ["    block 0 [0, 32)", "    block 1 [32, 64)", "    block 2 [64, 70)"]
    shown = "".join(text.strip("'") for _, text in blocks)
    assert (re.search(r"\{[^{}]+>[^{}]+\}", shown) is not None) == (objective == "mlm")
    if objective == "clm":
        assert shown == f"[CLS]{texts[0]}[SEP]"
    assert any(line.startswith("  [70, 100) document of 30 tokens: ") for line in lines)
    assert any(line.startswith("  [100, 120) document of 20 tokens: ") for line in lines)
    assert "  [120, 128) padding" in lines


def test_sentencepiece_refusal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too little\n", encoding="utf-8")
    with pytest.raises(DataError, match="--vocab_size 7"):
        train_tokenizer.main(
            ["--input", str(tmp_path), "--output", str(tmp_path / "t"), "--kind", "bpe", "--vocab_size", "7"]
        )


def test_standard_library_sample_is_real_and_deterministic(tmp_path: Path) -> None:
    names = {file.name for file in standard_library_files()}
    assert {"argparse.py", "typing.py", "json/decoder.py", "pydoc_data/topics.py"} < names
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in names)
    for folder in ("a", "b"):
        sample_corpus.main(["--output", str(tmp_path / folder), "--max_mb", "1"])
    assert folder_digests(tmp_path / "a") == folder_digests(tmp_path / "b")
    splits = {}
    for name in ("train", "validation"):
        lines = (tmp_path / "a" / name / "documents.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        splits[name] = {json.loads(line)["id"] for line in lines}
    assert splits["train"]
    assert splits["validation"]
    assert not splits["train"] & splits["validation"]
    size = sum((tmp_path / "a" / name / "documents.jsonl").stat().st_size for name in splits)
    assert 1e6 < size < 1.6e6


def test_sample_of_one_document_is_cut_at_a_line(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(100)), encoding="utf-8")
    sample_corpus.main(["--output", str(tmp_path / "out"), "--input", str(tmp_path / "one.txt")])
    texts = [
        json.loads((tmp_path / "out" / name / "documents.jsonl").read_text(encoding="utf-8"))["text"]
        for name in ("train", "validation")
    ]
    assert "".join(texts) == (tmp_path / "one.txt").read_text(encoding="utf-8")
    assert texts[1].startswith("line 9")


def test_a_book_with_bom_and_crlf(tmp_path: Path, tokenizer: Path) -> None:
    """Real novels where they are present, else a text made like them."""
    book = SHARED_DATA / "text" / "novels" / "Cbronte_Jane_1847.txt"
    if not book.is_file():
        book = tmp_path / "book.txt"
        source = Path(blocks.__file__).read_text(encoding="utf-8") * 100
        book.write_bytes(b"\xef\xbb\xbf" + source.replace("\n", "\r\n").encode("utf-8"))
    tokenize_command.main(
        ["--input", str(book), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "s"), "--workers", "1"]
    )
    corpus = open_corpus(tmp_path / "s")
    assert corpus.documents == 1
    assert corpus.tokens > 3 * 65_536
    ids = corpus.tokens_at(0, corpus.tokens)
    assert corpus.tokenizer().decode(ids[1:-1]) == clean_text(book.read_bytes().decode("utf-8"))
